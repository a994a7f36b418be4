# For people who work on it; needs pip install -e ".[dev]". Each target is what .ci/run or a page of the docs runs.
.PHONY: check format types test bench report

check:  ## what a commit must pass: style, format, types
	python -m ruff check .
	python -m ruff format --check .
	$(MAKE) types

format:
	python -m ruff check --fix .
	python -m ruff format .

types:  ## kernels/ is laid where an installation has it: type checkers do not read setup.py
	rm -rf build/types
	mkdir -p build/types/fastpix2pix
	ln -s "$(CURDIR)"/fastpix2pix/* "$(CURDIR)/kernels" build/types/fastpix2pix/
	cd build/types && python -m mypy --cache-dir "$(CURDIR)/.mypy_cache" --config-file "$(CURDIR)/pyproject.toml"

test:
	python -m pytest

bench:
	python -m pytest benchmarks/ --benchmark-only

report:  ## registers, spills and access widths of every kernel, compiled for eight generations of GPU
	python -m fastpix2pix.kernels.report
