"""What draws and trains the toy world's second edition; `pixrl toy build` will find it in a checkout.

`world/` is what moves into `src/pixrl/toy` when every gate passes (docs/log.md says where that stands); the modules
beside it are the stages of the build.
"""
