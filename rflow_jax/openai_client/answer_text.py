"""The answer in what a model wrote: without its thoughts, its markup, and what it says around the answer."""

import re

from rflow_jax.openai_client.messages import UnusableAnswer

_THOUGHT = r"(?:seed:)?(?:think|thinking|thoughts?|reasoning|analysis|scratchpad)"
_OPEN = rf"(?:<{_THOUGHT}>|\[THINK\]|\u25c1think\u25b7|<\|(?:think|begin_of_thought|START_THINKING)\|>)"
_CLOSE = rf"(?:</{_THOUGHT}>|\[/THINK\]|\u25c1/think\u25b7|<\|(?:/think|end_of_thought|END_THINKING)\|>)"
_OPENING, _CLOSING = re.compile(_OPEN, re.IGNORECASE), re.compile(_CLOSE, re.IGNORECASE)
_THOUGHTS = re.compile(f"{_OPEN}.*?{_CLOSE}", re.IGNORECASE | re.DOTALL)
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_BARE_CHANNELS = re.compile(r"\Aanalysis(?=[A-Z])")  # a server that drops the marks of gpt-oss leaves the words
_TOOLS = re.compile(r"<tool_call>|\[TOOL_CALLS\]|<\|tool_calls?|<\|python_tag\|>|<\uff5ctool\u2581call", re.IGNORECASE)
_TURN = re.compile(
    r"\A\s*(?:<s>|<\|im_start\|>\s*assistant\b|<\|assistant\|>|<\uff5cAssistant\uff5c>|\[/INST\]|<\|START_RESPONSE\|>)"
)
_END = re.compile(
    r"<\|(?:im_end|endoftext|end|return|call|start|eot_id|eom_id|user|observation|im_start|END_RESPONSE)\|>|</s>"
    r"|<\uff5cend\u2581of\u2581sentence\uff5c>|<end_of_turn>"
)
_BOX = re.compile(r"<answer>(.*?)</answer>|<\|begin_of_box\|>(.*?)<\|end_of_box\|>", re.IGNORECASE | re.DOTALL)
_NOUN = (
    r"(?:reflection|prompt|answer|instructions?|correction|grades?|evaluation|JSON(?: object)?|feedback|suggestions?"
    r"|version|result|output|response)"
)
_PREFACE = re.compile(
    r"\A(?:(?:sure|certainly|of course|okay|ok|absolutely)\b[^\n:.!]{0,40}[!.,]\s*)?"
    rf"(?:here(?:['\u2019]s| is| are)\b[^\n:]{{0,60}}\b{_NOUN}\b[^\n:]{{0,60}}"
    rf"|[#*_ ]*(?:the |my |your )?(?:final |new |refined |revised |improved |updated )*{_NOUN}(?: is)?[*_ ]*)"
    r":[*_]*\s*",
    re.IGNORECASE,
)
_FENCED = re.compile(r"\A(?:```|~~~)[\w-]*[ \t]*\n(.*?)(?:\n?(?:```|~~~)([^`{}]*)|)\Z", re.DOTALL)


def only_answer(text: str) -> str:
    """What a model answers.

    Raises:
        UnusableAnswer: it wrote nothing, thoughts alone, or calls of tools.
    """
    if not text.strip():
        raise UnusableAnswer("the answer is empty")
    text = _turn(_without_thoughts(_final_channel(text)))
    if _TOOLS.search(text):
        raise UnusableAnswer("the model calls a tool and gives no answer")
    if box := _BOX.search(text):
        text = box[1] or box[2] or ""
    text = _unfenced(_PREFACE.sub("", text.strip(), count=1))
    text = _PREFACE.sub("", text, count=1).strip()
    if not text:
        raise UnusableAnswer("the answer is empty, apart from thoughts and markup")
    return text


def _final_channel(text: str) -> str:
    """The last final channel of a text in the format of gpt-oss; any other text as it is."""
    if "<|channel|>" in text:
        finals = list(_FINAL.finditer(text))
        if not finals:
            raise UnusableAnswer("the model wrote thoughts and no answer: there is no final channel")
        return text[finals[-1].end() :]
    if _BARE_CHANNELS.match(text):
        _, found, answer = text.rpartition("assistantfinal")
        if not found:
            raise UnusableAnswer("the model wrote thoughts and no answer: there is no final channel")
        return answer
    return text


def _without_thoughts(text: str) -> str:
    """What follows the last thoughts; what stands outside them, if nothing follows."""
    outside = _THOUGHTS.sub("", text)
    closings = list(_CLOSING.finditer(text))
    after = text[closings[-1].end() :] if closings else text
    kept = after if after.strip() else outside
    if _OPENING.search(kept):
        raise UnusableAnswer("the model's thoughts do not end, so there is no answer; raise max_tokens")
    if _CLOSING.search(kept) or not kept.strip():
        raise UnusableAnswer("the model wrote thoughts and no answer")
    return kept


def _turn(text: str) -> str:
    """The model's own turn, without the marks of a chat template around it."""
    while _TURN.match(text):
        text = _TURN.sub("", text, count=1)
    return _END.split(text.strip(), maxsplit=1)[0]


def _unfenced(text: str) -> str:
    """What stands in a code fence at the beginning, if there is one; text after it may only be prose."""
    fenced = _FENCED.match(text)
    return fenced[1].strip() if fenced else text
