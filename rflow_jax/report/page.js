const list = document.getElementById("list");
const filters = document.getElementById("filters");

// --- The list: a row for each prompt; its details are made when it is opened.

function row(prompt, position) {
  const results = prompt.runs.map((short, run) => (short ? result(short, run) : el("span", { className: "result none" }, "not in this run")));
  const words = el("span", { className: "words" }, el("span", { className: "text" }, prompt.text),
    prompt.tag ? el("span", { className: "tag" }, prompt.tag.replaceAll("_", " ")) : null);
  const summary = el("summary", {}, words, el("span", { className: "results" }, ...results));
  const details = el("details", { className: "prompt", id: `p${position}` }, summary);
  details.addEventListener("toggle", () => { if (details.open && details.childElementCount === 1) open(details, prompt); });
  return details;
}

// One run: the best of the first 1, 2, 4, ... images wherever it changes. Several: each run's first and best image.
function result(short, run) {
  const look = (k, alt) => el("span", { className: k === short.chosen ? "look best" : "look" }, picture(run, short.looks[k], alt),
    el("small", {}, scoreText(short.looks[k])));
  const parts = [];
  if (short.chosen === null) parts.push(look(0, "first image"));
  else if (several) {
    if (short.chosen !== 0) parts.push(look(0, "first image"), el("span", { className: "arrow" }, "→"));
    parts.push(look(short.chosen, "chosen image"));
  } else {
    // Before the first score: the first image, whatever it is worth.
    short.bestOfFirst.forEach((k, at) => {
      const same = at > 0 && k === short.bestOfFirst[at - 1];
      parts.push(same ? el("span", { className: "look same" }) : look(k ?? 0, `best of ${data.numbers[at]}`));
    });
  }
  return el("span", { className: `result ${runClass(run)}`, title: several ? data.runs[run].name : null }, ...parts);
}

function legend() {
  if (several) return data.runs.map((run, k) => el("span", { className: `result ${runClass(k)}` }, el("i", { className: "swatch" }), run.name));
  if (!data.runs[0].verified) return [];
  const cells = data.numbers.map((number) => el("span", { className: "look" }, String(number)));
  return [el("span", {}, "best of the first"), el("span", { className: "result" }, ...cells)];
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
}

async function open(details, prompt) {
  const body = el("div", { className: "body" });
  details.append(body);
  const runs = await unpack(prompt.packed);
  body.append(...runs.map((pictures, run) => search(pictures, run, prompt.runs[run])));
  for (const chain of body.querySelectorAll(".chain")) chain.scrollLeft = chain.scrollWidth;
  for (const chosen of body.querySelectorAll(".column .chosen")) {
    const scroller = chosen.closest(".scroll");
    scroller.scrollLeft = chosen.offsetLeft - scroller.clientWidth / 2;
  }
}

// --- Filters and order.

const byNumbers = (a, b) => {
  if (!a || !b) return (a ? 0 : 1) - (b ? 0 : 1); // without a score: last
  return b[0] - a[0] || b[1] - a[1];
};
const rankOf = (prompt, run, k) => prompt.runs[run]?.looks[k]?.rank;
const bestOf = (prompt, run) => rankOf(prompt, run, prompt.runs[run]?.chosen);
const gainOf = (prompt, run) => {
  const [first, best] = [rankOf(prompt, run, 0), bestOf(prompt, run)];
  return first && best && [best[0] - first[0], best[1] - first[1]];
};
const spread = (prompt) => {
  const ranks = prompt.runs.map((_, run) => bestOf(prompt, run)).filter(Boolean).sort(byNumbers);
  return ranks.length > 1 ? [ranks[0][0] - ranks.at(-1)[0], ranks[0][1] - ranks.at(-1)[1]] : undefined;
};

const orders = [["Prompt order", null]];
data.runs.forEach((run, k) => {
  const of = several ? ` (${run.name})` : "";
  if (!run.verified) return;
  orders.push([`Best score, high first${of}`, (prompt) => bestOf(prompt, k)]);
  orders.push([`Best score, low first${of}`, (prompt) => bestOf(prompt, k)?.map((value) => -value)]);
  orders.push([`Gain over the first image${of}`, (prompt) => gainOf(prompt, k)]);
});
if (data.runs.filter((run) => run.verified).length > 1) orders.push(["Difference between the runs", spread]);

const tags = new Map();
for (const prompt of data.prompts) tags.set(prompt.tag, (tags.get(prompt.tag) ?? 0) + 1);
filters.tag.append(new Option("All tags", ""));
for (const [tag, count] of tags) filters.tag.append(new Option(`${tag === null ? "no tag" : tag.replaceAll("_", " ")} (${count})`, JSON.stringify(tag)));
filters.tag.hidden = tags.size < 2;
orders.forEach(([name], k) => filters.order.append(new Option(name, k)));

document.getElementById("legend").append(...legend());

const rows = data.prompts.map(row);
const searchable = data.prompts.map((prompt) => prompt.text.toLowerCase());

function filter() {
  const wanted = filters.words.value.toLowerCase().split(/\s+/).filter(Boolean);
  const tag = filters.tag.value === "" ? undefined : JSON.parse(filters.tag.value);
  let shown = 0;
  data.prompts.forEach((prompt, k) => {
    const match = (tag === undefined || prompt.tag === tag) && wanted.every((word) => searchable[k].includes(word));
    rows[k].hidden = !match;
    shown += match;
  });
  document.getElementById("shown").textContent = shown === rows.length ? plural(shown, "prompt") : `${shown} of ${plural(rows.length, "prompt")}`;
}

function order() {
  const key = orders[filters.order.value][1];
  const positions = data.prompts.map((_, k) => k);
  if (key) {
    const keys = data.prompts.map(key);
    positions.sort((a, b) => byNumbers(keys[a], keys[b]) || a - b);
  }
  list.append(...positions.map((k) => rows[k]));
}

filters.addEventListener("input", (event) => (event.target === filters.order ? order() : filter()));
filters.addEventListener("submit", (event) => event.preventDefault());
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, select")) return;
  event.preventDefault();
  filters.words.focus();
});

// A link to a prompt: index.html#p17.
function follow() {
  const target = /^#p\d+$/.test(location.hash) && document.getElementById(location.hash.slice(1));
  if (!target) return;
  target.open = true;
  target.scrollIntoView();
}
list.addEventListener("toggle", (event) => {
  if (event.target.className === "prompt" && event.target.open) history.replaceState(null, "", `#${event.target.id}`);
}, true);
addEventListener("hashchange", follow);
order();
filter();
follow();
