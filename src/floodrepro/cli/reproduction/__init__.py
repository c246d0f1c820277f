"""The whole path as stages: what is asked for, what each stage does, and a runner that leaves out what is done."""
