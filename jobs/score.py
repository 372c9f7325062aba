"""Score the influence of an iteration's probing set.

ray job submit --working-dir . -- python jobs/score.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("score")
