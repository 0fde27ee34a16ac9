"""Build the embedded image set from the npm packages of three emoji vendors.

Install the packages in an empty folder, then point this module at its `node_modules`::

    npm install emoji-datasource@16.0.0 emoji-datasource-google@16.0.0 \
        emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    python -m vislr.zoo.build_emoji node_modules

The result is one zip: `index.json` and a 64 x 64 WebP per concept and style, on white.
The same packages and the same Pillow give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import re
import zipfile
from pathlib import Path

from vislr.core.files import atomic_path
from vislr.zoo.emoji import ARCHIVE, STYLES

SIZE = 64
QUALITY = 90
LEFT_OUT = {"Flags", "Symbols", "Component"}
# Singular words that end in one s, so that the plural rule does not take their article away.
SINGULAR_S = {"bus", "compass", "cactus", "octopus", "lotus", "genus", "hibiscus", "trolleybus", "minibus", "canvas"}


def plain_words(name: str) -> str:
    """`"MAN: BEARD"` -> `"man beard"`: lower-case words of letters and digits, single spaces."""
    return " ".join(re.findall(r"[a-z0-9]+", name.lower().replace("\u2019", "").replace("'", "")))


def with_article(words: str) -> str:
    """`"cat face"` -> `"a cat face"`; plurals ("cherries", "people hugging") take no article."""
    head = re.split(r" (?:with|in|and|on|of|at) ", words)[0].split()
    noun = head[-1]
    plural = noun.endswith("s") and not noun.endswith("ss") and noun not in SINGULAR_S
    if plural or head[0] == "people":
        return words
    vowel = words.startswith((*"aeiou", "hour")) and not words.startswith(("one", "ewe", "eu", "uni", "ufo"))
    return f"{'an' if vowel else 'a'} {words}"


def split_of(codepoint: str) -> str:
    """A tenth of the concepts is held out, chosen by a hash, so that no list needs keeping."""
    return "held-out" if hashlib.sha256(codepoint.encode()).digest()[0] % 10 == 0 else "train"


def _fluent_file(folder: Path, entry: dict) -> Path | None:
    code = entry["unified"].lower()
    for spelling in (code, code.replace("-fe0f", ""), (entry["non_qualified"] or code).lower()):
        if (folder / f"{spelling}.webp").is_file():
            return folder / f"{spelling}.webp"
    return None


def _webp(path: Path) -> bytes:
    from PIL import Image

    with Image.open(path) as opened:
        image = opened.convert("RGBA")
    if image.size != (SIZE, SIZE):
        # Premultiplied, so that the colour of transparent pixels does not bleed into the edge.
        image = image.convert("RGBa").resize((SIZE, SIZE), Image.Resampling.LANCZOS).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    out = io.BytesIO()
    Image.alpha_composite(white, image).convert("RGB").save(out, "WEBP", quality=QUALITY, method=6)
    return out.getvalue()


def build(packages: Path, archive: Path = ARCHIVE) -> int:
    """Write `archive` from a `node_modules` folder; returns the number of images."""
    entries = json.loads((packages / "emoji-datasource/emoji.json").read_text())
    folders = {
        "noto": packages / "emoji-datasource-google/img/google/64",
        "twemoji": packages / "emoji-datasource-twitter/img/twitter/64",
        "fluent3d": packages / "@lobehub/fluent-emoji-3d/assets",
    }
    concepts, files, seen = [], {}, set()
    for entry in sorted(entries, key=lambda e: e["sort_order"]):
        fluent = _fluent_file(folders["fluent3d"], entry)
        shared = entry["has_img_google"] and entry["has_img_twitter"] and fluent
        name = plain_words(entry["name"] or entry["short_name"])
        if entry["category"] in LEFT_OUT or not shared or name in seen:
            continue
        seen.add(name)
        code = entry["unified"].lower()
        sources = {style: folder / entry["image"] for style, folder in folders.items()} | {"fluent3d": fluent}
        for style in STYLES:
            files[f"{style}/{code}.webp"] = _webp(sources[style])
        concepts.append(
            {
                "codepoint": code,
                "name": name,
                "phrase": with_article(name),
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "split": split_of(code),
            }
        )
    index = {"size": SIZE, "quality": QUALITY, "concepts": concepts}
    files["index.json"] = json.dumps(index, indent=0).encode()
    with atomic_path(archive) as temporary, zipfile.ZipFile(temporary, "w") as out:
        for member in sorted(files):
            # A fixed date keeps the archive's hash a function of its contents alone.
            info = zipfile.ZipInfo(member, date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED if member == "index.json" else zipfile.ZIP_STORED
            out.writestr(info, files[member])
    return len(files) - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("node_modules", type=Path)
    parser.add_argument("--out", type=Path, default=ARCHIVE)
    arguments = parser.parse_args()
    count = build(arguments.node_modules, arguments.out)
    print(f"{count} images, {arguments.out.stat().st_size / 1e6:.2f} MB -> {arguments.out}")


if __name__ == "__main__":
    main()
