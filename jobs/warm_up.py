"""Warm the student up on an iteration's warm-up set.

ray job submit --working-dir . -- python jobs/warm_up.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("warm_up")
