"""One file a stage: artifacts in, artifacts out. The order of the stages is in `montessori_ray.loop`."""
