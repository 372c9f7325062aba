"""Score files of examples for any student: `montessori score` as a job.

ray job submit --working-dir . -- python jobs/score_files.py --student /models/mine --warm-up /shared/warm_up.jsonl \
    --examples /shared/candidates.jsonl --reference /shared/reference.jsonl --output /shared/scores groups=8
"""

import typer

from montessori_ray.cli import score

if __name__ == "__main__":
    typer.run(score)
