"""Claims as files: a page, Markdown and JSON."""

import json
from collections.abc import Sequence
from pathlib import Path

from ling_probe.claims.claim import Claim, counted
from ling_probe.errors import UsageError
from ling_probe.shown import all_shown, markdown, pages, shown


def write_claims(claims: Sequence[Claim], folder: Path, *, model: str, text: str) -> Path:
    """Write claims.html, claims.md and claims.json into a folder, and return the path of the page.

    Args:
        claims: What is told.
        folder: Where to; files of the same names are replaced.
        model: Name of the model.
        text: Name of what it was run on.

    Raises:
        UsageError: The folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; name a folder for the claims")
    folder.mkdir(parents=True, exist_ok=True)
    told = ", ".join(f"{number} {verdict}" for verdict, number in counted(claims).items())
    rows = all_shown([claim.to_dict() for claim in claims])
    title = shown(f"Claims about the routing of {model} on {text}")
    values = {"claims": rows, "title": title, "told": told}
    found = pages()
    (folder / "claims.html").write_text(found.get_template("claims_page.html.j2").render(values), encoding="utf-8")
    head = f"# {markdown(title)}\n\n{told}\n\n"
    (folder / "claims.md").write_text(head + found.get_template("claims.md.j2").render(values), encoding="utf-8")
    lines = json.dumps(
        {"model": model, "text": text, "verdicts": counted(claims), "claims": rows}, indent=2, ensure_ascii=False
    )
    (folder / "claims.json").write_text(lines + "\n", encoding="utf-8")
    return folder / "claims.html"
