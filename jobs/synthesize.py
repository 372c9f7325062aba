"""The latest teacher writes instructions and responses: those of the next iteration, and fresh ones to judge it by.

ray job submit --working-dir . -- python jobs/synthesize.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("instructions", "responses", "fresh_instructions", "fresh_responses", "fresh_set")
