"""python -m weights [--check]: which models and files are known, which of them are present, their sizes and licences.

--check also compares the SHA-256 of the files that are present with the known one. Nothing is downloaded.
"""
import argparse

from weights import FILES, MODELS, _listing, present, sha256


def _size(path):
    files = [path] if path.is_file() else [path / name for name in _listing(path)]
    total = sum(f.stat().st_size for f in files)
    return f"{total / 1e9:.2f} GB" if total >= 1e9 else f"{total / 1e6:.1f} MB"


def main():
    parser = argparse.ArgumentParser(prog="python -m weights", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare the files' SHA-256 with the known one")
    args = parser.parse_args()
    bad = 0
    for title, table in (("models", MODELS), ("files", FILES)):
        print(f"{title}:")
        for name, known in table.items():
            path = next(filter(None, (present(name, dtype) for dtype in (None, "bf16", "fp16"))), None)
            if path:
                state = f"present  {_size(path):>9}  {path}"
                if args.check and title == "files":
                    good = sha256(path).startswith(known.sha256)
                    bad += not good
                    state += "  sha256 " + ("agrees" if good else "DIFFERS")
            else:
                size = f"{known.gigabytes:.1f} GB" if title == "models" else f"{known.megabytes:.0f} MB"
                state = f"absent   {size if known.repo else '':>9}  {known.repo or 'weights/'}"
                state += f"/{known.filename}" if title == "files" else ""
            print(f"  {name:18}{state}\n{'':20}licence: {known.licence}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
