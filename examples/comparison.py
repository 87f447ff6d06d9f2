"""Makes the picture of the README: the photos of this folder, enlarged by Pillow and restored by both systems.

Of each result the central 320×320 pixels are shown, so that the page shows them without shrinking.

    python -m examples.comparison                          # -> examples/picture/comparison.jpg, with the bundled model
    python -m examples.comparison a.jpg photos/ --out c.jpg --model sana-600m-512 --device cuda
"""
from pathlib import Path

import runs
from linearsr import LinearSR
from photos.pictures import bicubic, central, contact_sheet, find_inputs, read_rgb
from sanasr import SanaSR

HERE = Path(__file__).resolve().parent
SIDE = 320  # pixels shown of a picture


@runs.command
def main(argv=None):
    parser = runs.parser(__doc__)
    parser.add_argument("inputs", nargs="*", default=[HERE], help="pictures and folders (default: this folder)")
    parser.add_argument("--out", type=Path, default=HERE / "picture" / "comparison.jpg")
    parser.add_argument("--model", default="embedded", help="SANA-SR, see `python -m weights`")
    parser.add_argument("--adapter", help="LoRA weights (default: the model's own)")
    parser.add_argument("--linearsr", default="linearsr-embedded", help="LinearSR")
    parser.add_argument("--steps", type=int, default=4, help="of LinearSR")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    args = parser.parse_args(argv)
    device = runs.pick_device(args.device)
    one = SanaSR.from_pretrained(args.model, device, adapter=args.adapter)
    many = LinearSR.from_pretrained(args.linearsr, device)
    rows, labels = [], ["bicubic", "SANA-SR, one step", f"LinearSR, {args.steps} steps"]
    for photo in map(read_rgb, find_inputs(args.inputs)):
        results = bicubic(photo), one.restore(photo), many.restore(photo, steps=args.steps)
        rows.append([(label, central(x, SIDE)) for label, x in zip(labels, results, strict=True)])
        labels = ["", "", ""]  # they stand above the first row
    args.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(rows).save(args.out, quality=88)
    print(args.out)


if __name__ == "__main__":
    main()
