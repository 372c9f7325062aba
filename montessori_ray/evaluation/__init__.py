"""Measuring whether a run helped: losses on rows no stage has trained on, influence of fresh instructions."""
