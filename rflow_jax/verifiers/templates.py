"""What yes/no verifiers ask."""

from pathlib import Path
from string import Template

from rflow_jax.chat.prompt_file import read_prompt
from rflow_jax.errors import InputError

SHIPPED = Path(__file__).parent / "prompts"


def yes_no_template(template: str) -> Template:
    """What a yes/no verifier asks about the picture beside it; ``$prompt`` is the prompt.

    Args:
        template: ``raw`` (the prompt alone, as the original asks NVILA), ``question`` (a question around it), or
            the path of a file.

    Raises:
        InputError: there is no such file, or the prompt has no place in it.
    """
    if template == "raw":
        return Template("$prompt")
    path = SHIPPED / "yesno.md" if template == "question" else Path(template)
    asked = Template(read_prompt(path).strip())
    if "prompt" not in asked.get_identifiers():
        raise InputError(f"{path}: $prompt, the place of the prompt, is missing")
    return asked
