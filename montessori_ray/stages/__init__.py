"""One file a stage: artifacts in, artifacts out. The order of the stages is in `montessori_ray.loop`.

Engines (torch, DeepSpeed, TRL, Datasets) are imported where a stage's body begins, not at the top of its file:
`montessori plan` and `status` read the list of stages too, and should answer at once.
"""
