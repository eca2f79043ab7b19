// Every text here was written by a model or a user: it becomes text nodes and attributes, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;

function el(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key in node && key !== "width" && key !== "height") node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

const number = (value) => value.toFixed(Math.abs(value) < 100 ? 2 : 1);
const scored = (look) => look && look.rank !== undefined;
const scoreText = (look) => (scored(look) ? (look.label ? look.label + " " : "") + number(look.score) : "–");
const plural = (count, what) => `${count.toLocaleString("en")} ${what}${count === 1 ? "" : "s"}`;
const runClass = (run) => `run-${run % 6}${data.runs[run].verified ? "" : " unverified"}`;

function picture(run, look, alt) {
  if (!look.src) return el("span", { className: "missing", title: "The file is missing." }, "missing");
  // loading comes first: once src is set the browser may begin.
  const img = el("img", { loading: "lazy", decoding: "async", alt, width: look.width, height: look.height });
  img.src = data.runs[run].base + look.src;
  return img;
}

// --- One prompt in one run: the chain that leads to the selected picture, and all pictures by round.

// What a stage's pictures are called: one of them, and all.
const STAGES = {
  noise: ["noise", "From noise"],
  prompt: ["refined prompt", "From refined prompts"],
  reflect: ["correction", "Corrections"],
  neighbour: ["neighbour", "Neighbours"],
  given: ["given", "Given images"],
};
const nameOf = (one) => `${STAGES[one.stage]?.[0] ?? one.stage}, round ${one.round}`;

function search(pictures, run, short) {
  const section = el("section", { className: `search ${runClass(run)}` });
  if (several) section.append(el("h3", {}, el("i", { className: "swatch" }), data.runs[run].name));
  if (!pictures) {
    section.append(el("p", { className: "note" }, "This prompt is not in this run."));
    return section;
  }
  const chain = el("ol", { className: "chain", tabIndex: 0, ariaLabel: "How the image came about" });
  const title = el("h4", {});
  const view = { pictures, run, chosen: short.chosen, section, chain, title };
  section.append(el("p", { className: "note" }, outcome(short, run)), title, chain, ...stages(view));
  section.addEventListener("click", (event) => {
    const thumb = event.target.closest("button.thumb");
    if (thumb) select(view, Number(thumb.dataset.k));
  });
  section.addEventListener("keydown", (event) => move(view, event));
  select(view, short.chosen ?? 0);
  return section;
}

function outcome(short, run) {
  const count = plural(short.count, "image");
  if (short.chosen === null) return data.runs[run].verified ? `${count}, none scored` : count;
  if (short.chosen === 0) return `${count}; the first is the best`;
  const [first, best] = [short.looks[0], short.looks[short.chosen]];
  const gain = scored(first) && !best.label ? `, ${number(best.score - first.score)} above the first` : "";
  return `${count}; the best is number ${short.chosen + 1}${gain}`;
}

// The pictures by round: those from nothing side by side, later ones as a tree.
function stages(view) {
  const { pictures } = view;
  const groups = new Map();
  const later = [];
  pictures.forEach((one, k) => {
    if (one.parent === undefined) groups.set(one.stage, [...(groups.get(one.stage) ?? []), k]);
    else later.push(k);
  });
  const parts = [];
  for (const [stage, members] of groups) {
    parts.push(el("h4", {}, STAGES[stage]?.[1] ?? stage, el("small", {}, plural(members.length, "image"))),
      el("div", { className: "thumbs" }, ...members.map((k) => thumb(view, k))));
  }
  const kinds = new Set(later.map((k) => pictures[k].stage));
  const title = kinds.size === 1 ? STAGES[[...kinds][0]]?.[1] : null;
  if (later.length) parts.push(el("h4", {}, title ?? "Later rounds", el("small", {}, plural(later.length, "image"))), tree(view, later));
  return parts;
}

function thumb(view, k) {
  const one = view.pictures[k];
  const chosen = k === view.chosen;
  const name = `${nameOf(one)}, branch ${one.branch}, ${scored(one) ? `score ${scoreText(one)}` : "no score"}${chosen ? ", chosen" : ""}`;
  const button = el("button", { type: "button", className: "thumb", title: name, ariaLabel: name }, picture(view.run, one, ""),
    el("small", {}, chosen ? "★ " : "", scoreText(one)));
  button.dataset.k = k;
  button.classList.toggle("chosen", chosen);
  button.classList.toggle("unscored", !scored(one));
  return button;
}

// Rounds are columns; the first holds the images that were gone on from. Lines lead from parents to children.
function tree(view, later) {
  const { pictures } = view;
  const starts = new Set(later.map((k) => pictures[k].parent).filter((k) => pictures[k].parent === undefined));
  const columns = new Map([["start", [...starts].sort((a, b) => a - b)]]);
  for (const k of later) columns.set(pictures[k].round, [...(columns.get(pictures[k].round) ?? []), k]);
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const grid = el("div", { className: "tree" }, svg);
  for (const [round, members] of columns) {
    grid.append(el("div", { className: "column" }, el("small", {}, round === "start" ? round : `round ${round}`), ...members.map((k) => thumb(view, k))));
  }
  view.links = new Map(later.map((k) => [k, svg.appendChild(document.createElementNS(svg.namespaceURI, "path"))]));
  new ResizeObserver(() => connect(view, grid, svg)).observe(grid);
  return el("div", { className: "scroll" }, grid);
}

function connect(view, grid, svg) {
  const place = new Map([...grid.querySelectorAll("button")].map((button) => [Number(button.dataset.k), button]));
  for (const [k, path] of view.links) {
    const [from, to] = [place.get(view.pictures[k].parent), place.get(k)];
    const [x1, x2] = [from.offsetLeft + from.offsetWidth, to.offsetLeft];
    const [y1, y2] = [from, to].map((button) => button.offsetTop + button.firstChild.offsetHeight / 2);
    const middle = (x1 + x2) / 2;
    path.setAttribute("d", `M${x1},${y1} C${middle},${y1} ${middle},${y2} ${x2},${y2}`);
  }
  svg.setAttribute("width", grid.scrollWidth);
  svg.setAttribute("height", grid.scrollHeight);
}

function ancestry(pictures, k) {
  const line = [];
  for (let one = k; one !== undefined; one = pictures[one].parent) line.unshift(one);
  return line;
}

function select(view, k) {
  const line = ancestry(view.pictures, k);
  for (const button of view.section.querySelectorAll("button.thumb")) {
    const here = Number(button.dataset.k);
    button.classList.toggle("on", line.includes(here));
    button.ariaPressed = String(here === k);
    button.tabIndex = here === k ? 0 : -1;
  }
  for (const [child, path] of view.links ?? []) path.classList.toggle("on", line.includes(child));
  view.selected = k;
  view.title.replaceChildren(k === view.chosen ? "The chosen image" : "The selected image",
    el("small", {}, line.length > 1 ? `and the ${plural(line.length - 1, "image")} that led to it` : ""));
  view.chain.replaceChildren(...line.map((one) => step(view, one, one === k)));
  view.chain.scrollLeft = view.chain.scrollWidth;
}

// Arrow keys go to the next picture, in the tree to the next round.
function move(view, event) {
  const button = event.target.closest("button.thumb");
  const forward = { ArrowLeft: false, ArrowUp: false, ArrowRight: true, ArrowDown: true }[event.key];
  if (!button || forward === undefined) return;
  const sibling = forward ? "nextElementSibling" : "previousElementSibling";
  const column = button.closest(".column");
  let next = button[sibling];
  if (column && event.key !== "ArrowUp" && event.key !== "ArrowDown") {
    const row = [...column.querySelectorAll("button")].indexOf(button);
    next = [...(column[sibling]?.querySelectorAll("button") ?? [])].slice(0, row + 1).at(-1);
  }
  if (!next?.matches("button")) return;
  event.preventDefault();
  select(view, Number(next.dataset.k));
  next.focus();
}

function step(view, k, last) {
  const one = view.pictures[k];
  const shown = picture(view.run, one, nameOf(one));
  const link = one.src ? el("a", { href: data.runs[view.run].base + one.src, target: "_blank", rel: "noopener" }, shown) : shown;
  const caption = el("p", { className: "caption" }, el("b", {}, (k === view.chosen ? "★ " : "") + scoreText(one)), nameOf(one));
  const item = el("li", { className: last ? "step last" : "step" });
  item.append(link, caption, ...words("Reflection", one.reflection), ...words("Refined prompt", one.refined));
  for (const problem of one.problems ?? []) item.append(el("p", { className: "problem" }, problem));
  if (one.explanation) item.append(el("details", { open: last }, el("summary", {}, "Verifier"), el("p", {}, one.explanation)));
  return item;
}

const words = (title, text) => (text ? [el("h5", {}, title), el("p", {}, text)] : []);
