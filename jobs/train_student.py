"""Train the original student on the last teacher's training set.

ray job submit --working-dir . -- python jobs/train_student.py --config configs/quickstart.yaml run=/shared/first
"""

from montessori_ray.cli import job

if __name__ == "__main__":
    job("training_set", "train_student")
