"""The phases of training: each a recipe's keys (`Config`), and `train(config, log) -> metrics`.

A phase reads the folder that the ones before it wrote and adds its components, so that the folder
is a complete pipeline after the last. `taiji.train.recipe.PHASES` lists them.
"""
