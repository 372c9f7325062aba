"""Tune the teacher by DPO on an iteration's pairs.

ray job submit --working-dir . -- python jobs/tune_teacher.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("tune_teacher")
