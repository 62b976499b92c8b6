"""A Griffe extension: references in docstrings, [`Name`] or [`~package.module.Name`], become links to the API pages."""

import re

from griffe import AliasResolutionError, Extension, NameResolutionError


REFERENCE = re.compile(r"\[`~?([\w.]+)`\](?:\[([\w.]*)\])?")


def _full_name(obj, name: str) -> str:
    """Returns the path of `name` as seen from `obj`, or `name` where the scope of `obj` does not contain it."""
    head, _, tail = name.partition(".")
    if head == "modeling_moe":  # a module of the package has the package's name
        return name
    try:
        found = obj.resolve(head)
    except (NameResolutionError, AliasResolutionError):
        return name
    return f"{found}.{tail}" if tail else found


class References(Extension):
    """Replaces the references in each docstring before it is rendered."""

    def on_object(self, *, obj, **kwargs) -> None:
        """Rewrites the docstring of one object; a reference without an API page stays plain code."""
        if obj.docstring is None:
            return

        def link(match: re.Match) -> str:
            name = match[2] or match[1]
            shown = match[1].rsplit(".", 1)[-1] if "~" in match[0] else match[1]
            return f'<autoref optional identifier="{_full_name(obj, name)}"><code>{shown}</code></autoref>'

        text = REFERENCE.sub(link, obj.docstring.value)
        # a paragraph that begins with "# B batch, ..." is a legend or a diagram, and no heading
        paragraphs = text.split("\n\n")
        drawn = [f"```text\n{part}\n```" if part.startswith("# ") else part for part in paragraphs]
        obj.docstring.value = "\n\n".join(drawn)
