"""`python -m montessori_ray` is the `montessori` command."""

from montessori_ray.cli import main

main()
