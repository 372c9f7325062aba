"""The teacher writes instructions and responses of an iteration.

ray job submit --working-dir . -- python jobs/synthesize.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("instructions", "responses")
