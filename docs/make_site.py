"""Build the documentation as a site in build/site, and check every link in it: ``python docs/make_site.py``.

The pages keep their places relative to one another, so that a link works in a checkout and on the site; files that they
link to (scripts, configs, cards) go along. The reference is made from the docstrings of what the packages hand on.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
SOURCE, SITE = ROOT / "build" / "docs", ROOT / "build" / "site"
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/*.md", "docs/decisions/*.md", "examples/README.md")
LINK = re.compile(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)")
PACKAGES: tuple[str, ...] = (
    "neurons",
    "models",
    "selection",
    "attacks",
    "training",
    "evaluation",
    "data",
    "config",
    "reporting",
)
PACKAGES += ("planning", "runs", "analysis", "runtime", "cli")


def pages() -> list[Path]:
    """The Markdown pages of the site, by their paths in the checkout."""
    return sorted(path.relative_to(ROOT) for pattern in PAGES for path in ROOT.glob(pattern))


def linked(page: Path) -> set[Path]:
    """The files of the checkout that a page links to."""
    targets = LINK.findall((ROOT / page).read_text(encoding="utf-8"))
    files = {(ROOT / page.parent / target).resolve() for target in targets if ":" not in target}
    return {file.relative_to(ROOT) for file in files if file.is_file()}


def listed_folders(text: str, page: Path) -> str:
    """The page with links to folders, which a site does not list, as plain words."""

    def plain(match: re.Match[str]) -> str:
        return match[1] if (ROOT / page.parent / match[2]).is_dir() else match[0]

    return re.sub(r"\[([^\]]+)\]\(([^)\s#:]+)\)", plain, text)


def stage() -> None:
    """Copy pages and what they link to into the folder that the site is built from."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    wanted = {file for page in pages() for file in linked(page)} | set(pages())
    for file in sorted(wanted):
        target = SOURCE / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            target.write_text(listed_folders((ROOT / file).read_text(encoding="utf-8"), file), encoding="utf-8")
        else:
            shutil.copyfile(ROOT / file, target)


def faces() -> dict[str, dict[str, tuple[str, ...]]]:
    """What the package and each of its packages hand on, by module."""
    return {
        name: vars(importlib.import_module(f"safeneuron.{name}".rstrip(".")))["MODULES"] for name in ("", *PACKAGES)
    }


def write_reference() -> None:
    """A page for each package with the docstrings of what it hands on, and one with the names at the top."""
    folder = SOURCE / "reference"
    folder.mkdir(parents=True, exist_ok=True)
    handed_on = faces()
    top = {name: module for module, names in handed_on.pop("").items() for name in names}
    lines = ["# Reference\n", "The names of `import safeneuron as sn`, each with its whole name.\n"]
    lines += [f"- [`sn.{name}`][safeneuron.{top[name]}.{name}]" for name in sorted(top, key=str.casefold)]
    lines += ["\nThe packages:\n", *(f"- [`safeneuron.{name}`]({name}.md)" for name in handed_on)]
    # What lies beside the packages has no page of its own.
    lines += [f"\n::: safeneuron.{top[name]}.{name}" for name in top if "." not in top[name]]
    (folder / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for package, modules in handed_on.items():
        purpose = (importlib.import_module(f"safeneuron.{package}").__doc__ or "").replace("``", "`")
        public = {(module, name) for module, names in modules.items() for name in names}
        at_top = {(module, name) for name, module in top.items()}
        public |= {(module.partition(".")[2], name) for module, name in at_top if module.startswith(f"{package}.")}
        parts = [f"# safeneuron.{package}\n", purpose]
        parts += [f"::: safeneuron.{package}.{module}.{name}\n" for module, name in sorted(public)]
        (folder / f"{package}.md").write_text("\n".join(parts), encoding="utf-8")


class Links(HTMLParser):
    """The links of a page, and the places in it that can be linked to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the link or the place of one element."""
        for key, value in attrs:
            if key in ("href", "src") and value is not None:
                self.targets.add(value)
            elif key in ("id", "name") and value is not None:
                self.anchors.add(value)


def broken() -> list[str]:
    """The links of the site that lead nowhere: to no file, or to no place in it."""
    site = {page: Links(page) for page in sorted(SITE.rglob("*.html"))}
    wrong = []
    for page, links in site.items():
        for target in sorted(links.targets):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or page.name == "404.html":
                continue
            file = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            file = file / "index.html" if file.is_dir() else file
            anchors = site[file].anchors if file in site else set()
            if not file.is_file() or (parts.fragment and file in site and unquote(parts.fragment) not in anchors):
                wrong.append(f"{page.relative_to(SITE)}: {target}")
    return wrong


def main() -> int:
    """Build and check; the exit code is 1 where the build warns or a link is broken."""
    stage()
    write_reference()
    shutil.rmtree(SITE, ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    environment = os.environ | {"NO_COLOR": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if built.returncode:
        sys.stderr.write(f"{built.stdout}{built.stderr.partition('Traceback')[0]}")
        return 1
    wrong = broken()
    sys.stderr.writelines(f"broken link in {line}\n" for line in wrong)
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE.relative_to(ROOT)}, {len(wrong)} broken links")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
