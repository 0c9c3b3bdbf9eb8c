"""The curves of ``prove_follow.py`` as docs/follow.md shows them: a plot beside it, and a table in
it, between its two marks.

    python tests/follow_plot.py --curve /tmp/proof/curve-15.json \\
        --quantized /tmp/proof/quantized-15.json

Measures nothing. Without --quantized the first alone. Needs matplotlib.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

from following.plot import fill, markdown, plot  # noqa: E402

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "follow.md"
IMAGE = "follow-tau.png"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--curve", type=Path, required=True, help="JSON of --part curve")
    parser.add_argument("--quantized", type=Path, help="JSON of --part quantized")
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="that is filled in")
    args = parser.parse_args()
    files = {"fine-tuned": args.curve, "fine-tuned, in 8 bits": args.quantized}
    tables = {name: json.loads(path.read_text()) for name, path in files.items() if path}
    image = args.document.with_name(IMAGE)
    text = f"![tau against minutes of a refresh]({IMAGE})\n\n{markdown(tables)}"
    filled = fill(args.document.read_text(), text)
    plot(tables, image)
    args.document.write_text(filled)
    print(f"{args.document}, {image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
