"""The whole loop, from seeds to a trained and evaluated student.

ray job submit --working-dir . -- python jobs/full_loop.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job()
