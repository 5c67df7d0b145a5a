"""How docstrings of the package become pages: read by mkdocstrings, see mkdocs.yml."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Spell what help() shows the way Markdown wants it."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Doctests are a section of examples, and ``::`` is no Markdown."""
        if obj.docstring is None:
            return
        text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
        obj.docstring.value = re.sub(r"::$", ":", text, flags=re.MULTILINE)
