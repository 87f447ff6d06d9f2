"""Makes the picture of the README: the photos of this folder, enlarged by Pillow and restored by both systems.

Of each result the central 320×320 pixels are shown, so that the page shows them without shrinking.

    python -m examples.comparison                          # -> examples/picture/comparison.jpg, with the bundled model
    python -m examples.comparison a.jpg photos/ --out c.jpg --model sana-600m-512 --device cuda
"""
import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from linearsr import LinearSR
from photos.pictures import bicubic, find_inputs, read_rgb
from runs import command, pick_device
from sanasr import SanaSR

HERE = Path(__file__).resolve().parent
SIDE, GAP, HEAD, LETTERS = 320, 8, 28, 20  # pixels: shown of a picture, between pictures, of the labels' line


def central(image):
    """The part that is shown: at most SIDE×SIDE."""
    w, h = min(image.width, SIDE), min(image.height, SIDE)
    left, top = (image.width - w) // 2, (image.height - h) // 2
    return image.crop((left, top, left + w, top + h))


def side_by_side(rows, labels):
    """rows: [(picture, picture, …)] of RGB pictures, one size in each row -> one white sheet with labels on top."""
    wide = max(row[0].width for row in rows) + GAP
    sheet = Image.new("RGB", (len(labels) * wide - GAP, HEAD + sum(row[0].height + GAP for row in rows) - GAP), "white")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(LETTERS), HEAD
    for i, label in enumerate(labels):
        draw.text((i * wide + (wide - GAP) // 2, HEAD // 2), label, "black", font, anchor="mm")
    for row in rows:
        for i, image in enumerate(row):
            sheet.paste(image, (i * wide + (wide - GAP - image.width) // 2, y))
        y += row[0].height + GAP
    return sheet


@command
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], epilog=__doc__.split("\n\n", 1)[1],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="*", default=[HERE], help="pictures and folders (default: this folder)")
    parser.add_argument("--out", type=Path, default=HERE / "picture" / "comparison.jpg")
    parser.add_argument("--model", default="embedded", help="SANA-SR, see `python -m weights`")
    parser.add_argument("--adapter", help="LoRA weights (default: the model's own)")
    parser.add_argument("--linearsr", default="linearsr-embedded", help="LinearSR")
    parser.add_argument("--steps", type=int, default=4, help="of LinearSR")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    one = SanaSR.from_pretrained(args.model, device, adapter=args.adapter)
    many = LinearSR.from_pretrained(args.linearsr, device)
    photos = [read_rgb(path) for path in find_inputs(args.inputs)]
    rows = [[central(x) for x in (bicubic(photo), one.restore(photo), many.restore(photo, steps=args.steps))]
            for photo in photos]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(rows, ["bicubic", "SANA-SR, one step", f"LinearSR, {args.steps} steps"]).save(args.out, quality=88)
    print(args.out)


if __name__ == "__main__":
    main()
