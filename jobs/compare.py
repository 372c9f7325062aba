"""All arms of a comparison, sharing what does not differ.

ray job submit --working-dir . -- python jobs/compare.py --config configs/evidence_cpu.yaml run=/shared/evidence
"""

import typer

from montessori_ray.cli import compare

if __name__ == "__main__":
    typer.run(compare)
