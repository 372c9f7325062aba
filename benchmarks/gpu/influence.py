"""`benchmarks/influence.py` with the sizes for one GPU: TinyLlama-1.1B's shape, 192 reference rows, 64 points; in
bfloat16, as the paper's procedure is, and in tf32 beside it.

    python benchmarks/gpu/influence.py --rows FILE.jsonl --json influence.json

All other arguments of that script may follow.
"""

import runpy
import sys
from pathlib import Path

SIZES = {"device": "cuda", "shape": "tinyllama", "reference": 192, "points": 64, "paper-rows": 192, "tokens": 16384}

if __name__ == "__main__":
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", str(value))]
    sys.argv[1:1] = [*sizes, "--precision", "bfloat16", "tf32"]
    runpy.run_path(str(Path(__file__).parent.parent / "influence.py"), run_name="__main__")
