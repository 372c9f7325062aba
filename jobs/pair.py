"""Build an iteration's preference pairs.

ray job submit --working-dir . -- python jobs/pair.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("pair")
