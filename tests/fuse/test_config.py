"""The fuse recipe: what is refused, what is filled in, and that it reads back as it was written."""

import pytest

from pixrl import config as recipes
from pixrl.algorithms import SAMPLERS
from pixrl.errors import ConfigError
from pixrl.fusion.config import FuseConfig

PAIR = {"concepts": ["owl", "snail"]}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("budget=3", "a budget of 3 pictures is below one batch of 16"),
        ("sampler=rmlr", "Input should be 'rmler'"),
        ("concepts=[owl, Owl]", "given twice"),
        ("concepts=[owl]", "at least two concepts"),
        ("options.lrr=1", "Did you mean 'lr'"),
        ("options.policy=papper", "compact"),
        ("options.lr=-1", "greater than 0"),
        ("alpha=-1", "greater than or equal to 0"),
        ("bugdet=4", "Did you mean 'budget'"),
        ("keep=0", "greater than or equal to 1"),
        ("presence=2", "less than 1"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(override, says):
    with pytest.raises(ConfigError, match=says):
        recipes.load(FuseConfig, PAIR, [override])


def test_an_option_of_another_sampler_is_refused():
    with pytest.raises(ConfigError, match="the sampler 'random' has no option 'lr'"):
        recipes.load(FuseConfig, PAIR, ["sampler=random", "options.lr=1"])


@pytest.mark.parametrize("sampler", list(SAMPLERS.entries))
def test_a_resolved_recipe_holds_every_option_and_reads_back_equal(sampler):
    config = recipes.load(FuseConfig, PAIR, [f"sampler={sampler}"])
    text = recipes.dump(config)
    assert recipes.load(FuseConfig, recipes.parse_yaml(text, "recipe")) == config
    if sampler == "rmler":
        assert {"lr", "epochs", "clip", "policy", "baseline"} <= set(config.options)


def test_the_last_batch_may_be_smaller():
    config = FuseConfig(budget=40, batch=16, pool=0)
    assert config.steps == 3
    assert [config.count(step) for step in range(3)] == [16, 16, 8]
    assert [config.first_index(step) for step in range(4)] == [0, 16, 32, 40]


def test_a_pool_is_the_last_of_the_budget():
    config = FuseConfig(budget=60, batch=16, pool=20)
    assert (config.learning_images, config.learning_steps, config.steps) == (40, 3, 5)
    assert [config.count(step) for step in range(5)] == [16, 16, 8, 16, 4]
    assert [config.first_index(step) for step in range(6)] == [0, 16, 32, 40, 56, 60]
    assert FuseConfig(budget=128).pool_images == 32
    assert FuseConfig(budget=16, batch=16).pool_images == 0
    assert FuseConfig(budget=60, pool=20, sampler="random").pool_images == 0
    with pytest.raises(
        ValueError, match="leaves less than one batch of 16 to learn from; give --pool 16 or less"
    ):
        FuseConfig(budget=32, pool=17)


@pytest.mark.parametrize("name", ["toy/fuse", "sdxl-turbo/fuse"])
def test_the_committed_recipes_load(name):
    config = recipes.load(FuseConfig, name, kind="fuse")
    assert config.budget >= config.batch
