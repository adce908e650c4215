"""Draw the embedded emoji pictures: three styles, one sheet each, and their captions.

    npm pack @iconify-json/noto @iconify-json/fluent-emoji-flat @iconify-json/twemoji   # unpack each
    apt-get install librsvg2-bin unicode-data
    python examples/emoji/build_pictures.py --icons DIR --out fastdiff/assets/emoji/pictures

DIR holds one unpacked npm package a style (`noto/`, `fluent-emoji-flat/`, `twemoji/`, each with `icons.json`).
Names are those of Unicode (emoji-test.txt). If a style does not draw a name on the list, the script stops with an error.
"""

import argparse
import io
import json
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

STYLES = {"noto": "noto", "fluent": "fluent-emoji-flat", "twemoji": "twemoji"}
CELL_PX, GLYPH_PX, COLUMNS = 64, 54, 16  # the margin always shows the background

# Emoji that differ in silhouette or colour at 64 px; the group is the coarse word of a caption ("fruit on red").
GROUPS = {
    "face": "grinning face with big eyes|winking face|smiling face with heart-eyes|face with tongue|"
    "smiling face with sunglasses|nerd face|cowboy hat face|enraged face|smiling face with horns|"
    "clown face|ghost|alien|robot|skull|pile of poo|jack-o-lantern",
    "animal": "monkey face|dog face|wolf|fox|raccoon|cat face|black cat|lion|tiger face|horse face|unicorn|zebra|"
    "deer|cow face|pig face|ram|camel|giraffe|elephant|rhinoceros|mouse face|rabbit face|chipmunk|hedgehog|"
    "bat|bear|polar bear|koala|panda|sloth|kangaroo|frog|crocodile|turtle|snake|dragon face|sauropod",
    "bird": "rooster|hatching chick|baby chick|penguin|dove|eagle|duck|swan|owl|flamingo|peacock|parrot",
    "sea creature": "spouting whale|dolphin|tropical fish|blowfish|shark|octopus|crab|lobster|squid|jellyfish",
    "bug": "snail|butterfly|ant|honeybee|lady beetle|spider",
    "plant": "rose|sunflower|tulip|cherry blossom|hibiscus|seedling|evergreen tree|deciduous tree|palm tree|"
    "cactus|four leaf clover|maple leaf|mushroom",
    "fruit": "grapes|melon|watermelon|tangerine|lemon|banana|pineapple|red apple|green apple|pear|peach|cherries|"
    "strawberry|blueberries|kiwi fruit|coconut",
    "vegetable": "avocado|eggplant|carrot|ear of corn|hot pepper|broccoli|onion",
    "food": "bread|croissant|pretzel|bagel|pancakes|cheese wedge|meat on bone|bacon|hamburger|french fries|pizza|"
    "hot dog|taco|cooking|popcorn|rice ball|sushi",
    "sweet": "soft ice cream|doughnut|cookie|birthday cake|cupcake|chocolate bar|candy|lollipop|honey pot",
    "drink": "hot beverage|teapot|wine glass|cocktail glass|tropical drink|beer mug|bubble tea",
    "vehicle": "locomotive|bus|ambulance|fire engine|police car|taxi|automobile|delivery truck|tractor|racing car|"
    "motorcycle|bicycle|sailboat|ship|airplane|helicopter|rocket|flying saucer",
    "sky": "full moon|crescent moon|sun with face|star|ringed planet|cloud with rain|rainbow|umbrella|snowflake|"
    "snowman|fire|water wave",
    "ball": "soccer ball|baseball|basketball|volleyball|tennis|american football|pool 8 ball|crystal ball",
    "music": "guitar|violin|trumpet|saxophone|accordion|drum|musical keyboard|microphone|headphone|bell",
    "thing": "red heart|broken heart|balloon|wrapped gift|trophy|bullseye|teddy bear|game die|artist palette|"
    "glasses|necktie|t-shirt|jeans|dress|backpack|running shoe|crown|top hat|lipstick|gem stone|"
    "mobile phone|laptop|television|camera|light bulb|closed book|envelope|package|pencil|scissors|key|hammer|"
    "axe|bomb|magnet|alarm clock|hourglass done|house|castle|tent|volcano|anchor",
}


def code_points(emoji_test: Path) -> dict[str, str]:
    """Unicode name -> hexadecimal code points joined by '-', fully-qualified emoji only."""
    line = re.compile(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[\d.]+ (.*)")
    matches = (line.match(row) for row in emoji_test.read_text(encoding="utf-8").splitlines())
    return {m[2]: m[1].lower().replace(" ", "-") for m in matches if m}


def svg(package: Path, code: str) -> str:
    """The SVG markup of an emoji, given by its code points, from an unpacked icon package."""
    chars = json.loads((package / "chars.json").read_text())
    icons = json.loads((package / "icons.json").read_text())
    name = chars.get(code) or chars.get(code.replace("-fe0f", ""))
    if name is None:
        raise SystemExit(f"{package.name} does not draw {code}")
    icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
    width = icon.get("width", icons.get("width", 16))
    height = icon.get("height", icons.get("height", 16))
    body = icon["body"]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{body}</svg>'
    )


def draw(markup: str, size_px: int) -> Image.Image:
    """Render SVG markup as an RGBA picture that fits into size_px x size_px."""
    png = subprocess.run(
        ["rsvg-convert", "-w", str(size_px), "-h", str(size_px), "-a"],
        input=markup.encode(),
        capture_output=True,
        check=True,
    ).stdout
    return Image.open(io.BytesIO(png)).convert("RGBA")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--icons", type=Path, required=True)
    parser.add_argument("--emoji-test", type=Path, default=Path("/usr/share/unicode/emoji/emoji-test.txt"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    codes = code_points(args.emoji_test)
    rows = [(name, group) for group, names in GROUPS.items() for name in names.split("|")]
    missing = [name for name, _ in rows if name not in codes]
    if missing:
        raise SystemExit(f"not fully-qualified emoji names: {missing}")
    args.out.mkdir(parents=True, exist_ok=True)
    for style, package in STYLES.items():
        markups = [svg(args.icons / package, codes[name]) for name, _ in rows]
        with ThreadPoolExecutor() as pool:
            cells = list(pool.map(lambda m: draw(m, GLYPH_PX), markups))
        sheet = Image.new("RGBA", (COLUMNS * CELL_PX, -(-len(cells) // COLUMNS) * CELL_PX))
        for i, cell in enumerate(cells):
            left = (i % COLUMNS) * CELL_PX + (CELL_PX - cell.width) // 2
            top = (i // COLUMNS) * CELL_PX + (CELL_PX - cell.height) // 2
            sheet.paste(cell, (left, top))
        sheet.save(args.out / f"{style}.png", optimize=True)
    captions = [{"name": name, "group": group, "code": codes[name]} for name, group in rows]
    lines = ",\n".join(json.dumps(row) for row in captions)
    (args.out / "captions.json").write_text(f"[\n{lines}\n]\n")
    print(f"{len(rows)} pictures in {len(STYLES)} styles -> {args.out}")


if __name__ == "__main__":
    main()
