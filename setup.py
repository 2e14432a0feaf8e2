"""Packages live in two folders: `bilinear_ops/` and `kernels/`, which installs as `bilinear_ops.kernels`.

`kernels/` has no `__init__.py`: the import name `kernels` belongs to another project, which we must not shadow.
"""

from setuptools import setup

setup(
    packages=[
        "bilinear_ops",
        "bilinear_ops.analysis",
        "bilinear_ops.analysis.eigen",
        "bilinear_ops.composite",
        "bilinear_ops.composite.interaction",
        "bilinear_ops.composite.rank1",
        "bilinear_ops.integrations",
        "bilinear_ops.interaction",
        "bilinear_ops.kernels",
        "bilinear_ops.kernels.interaction",
        "bilinear_ops.kernels.rank1",
        "bilinear_ops.nn",
        "bilinear_ops.rank1",
        "bilinear_ops.reference",
        "bilinear_ops.reference.interaction",
        "bilinear_ops.reference.rank1",
    ],
    package_dir={"bilinear_ops.kernels": "kernels"},
    package_data={"bilinear_ops": ["py.typed"]},
)
