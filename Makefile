# Two commands do everything on a fresh machine: make demo, make test. Each checks what it needs first, says what it is
# doing, and is quick the second time. tools/*.sh and tools/*.py do the work; this file only names them.
.PHONY: help demo test test-full deps venv model format lint clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       prefill a real model's long prompt on two workers and let a decode node continue it"
	@echo "                  [MODEL=dir] [PROMPT=file.txt] [QUESTION=text] [WORKERS=2] [TLS=1]"
	@echo "make test       build (preset dev) and run every test that is not labelled slow"
	@echo "make test-full  also the slow tests, the repeated fault tests, and the asan and tsan builds"
	@echo "make deps       install the Debian packages of tools/packages*.txt (as root; else print the command)"
	@echo "make format     clang-format the sources       make lint    clang-tidy, layering, protos"
	@echo "make clean      remove build/ and .demo/ (keeps .venv and .cache)"

export MODEL PROMPT QUESTION WORKERS TLS

demo:
	@bash tools/demo.sh

test:
	@bash tools/test.sh

test-full:
	@bash tools/test.sh --full

deps:
	@bash tools/deps.sh

venv:
	@bash tools/venv.sh

model: venv
	@.venv/bin/python tools/fetch_model.py

format:
	@bash tools/format.sh

lint:
	@bash tools/lint.sh

clean:
	rm -rf build .demo
