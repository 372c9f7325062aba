"""`benchmarks/influence.py` with the sizes for one GPU: TinyLlama-1.1B's shape, 192 reference rows, 64 points; in
bfloat16, as the paper's procedure is, and in tf32 beside it.

    python benchmarks/gpu/influence.py --rows FILE.jsonl --json influence.json

All other arguments of that script may follow.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import influence

if __name__ == "__main__":
    influence.main([*influence.ONE_GPU, *sys.argv[1:]])
