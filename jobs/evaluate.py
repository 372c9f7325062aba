"""Measure students and teachers.

ray job submit --working-dir . -- python jobs/evaluate.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("score_fresh", "evaluate")
