"""Cut an iteration's examples into warm-up and probing sets.

ray job submit --working-dir . -- python jobs/split.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("warmup_set", "probing_set")
