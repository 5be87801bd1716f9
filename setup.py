"""Where the packages of the wheel lie; everything else about the package stands in pyproject.toml.

The recipes lie in ``recipes/``, where users of a clone type ``--config recipes/NAME.yaml``. A wheel carries the same
files as ``sbn_lightning/recipes``. ``pyproject.toml`` can search for packages or rename one, but not both, and the
search is what keeps a new folder from being forgotten. So this file exists.
"""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(".", include=["sbn_lightning*"]),
        *find_packages("kernels", include=["sbn_kernels*"]),
        "sbn_lightning.recipes",
        "sbn_lightning.recipes.sizes",
    ],
    package_dir={"sbn_kernels": "kernels/sbn_kernels", "sbn_lightning.recipes": "recipes"},
    package_data={
        "sbn_lightning": ["py.typed"],
        "sbn_kernels": ["py.typed"],
        "sbn_lightning.recipes": ["*.yaml"],
        "sbn_lightning.recipes.sizes": ["*.yaml"],
    },
)
