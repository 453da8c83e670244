"""What trains the toy world's checkpoints; no wheel carries it.

`first_edition/` makes the checkpoints that pixrl ships (`pixrl toy build`), `python -m toy_build` those of the second
edition: `world/` is what moves into `src/pixrl/toy` when every gate passes (docs/log.md says where that stands), and
the modules beside it are the stages of its build.
"""
