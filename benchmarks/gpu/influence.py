"""`benchmarks/influence.py` with the sizes for one GPU: TinyLlama-1.1B's shape, 192 reference rows, 64 points.

    python benchmarks/gpu/influence.py --rows FILE.jsonl --json influence.json

All other arguments of that script may follow.
"""

import runpy
import sys
from pathlib import Path

SIZES = {"device": "cuda", "shape": "tinyllama", "reference": 192, "points": 64, "paper-rows": 192, "tokens": 16384}

if __name__ == "__main__":
    sys.argv[1:1] = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    runpy.run_path(str(Path(__file__).parent.parent / "influence.py"), run_name="__main__")
