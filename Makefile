# `make` lists the targets.  Everything is set up on demand in .venv.

# Which Python: make PYTHON=python3.12 test
PYTHON ?= python3
# More arguments, for pytest: make test ARGS="-k locks -x"
ARGS ?=

# What `make wheels` tests on; it builds on the first two.  There it is these
# tests, each with one of its sets of parameters: `make test` has them all on
# 3.11, `make interpreters` on each.
WHEEL_PYTHONS := 3.11 3.12 3.13
WHEEL_ENVS := $(WHEEL_PYTHONS:%=build/python-%)
WHEEL_TESTS := $(addprefix tests/test_,command.py import.py kernel_results.py \
    reaper.py values.py)

# What `make vm` boots, by Debian suite: Linux 5.10, which has no such call,
# 6.1, 6.12, and the newest; as whom; and the tests that a kernel may change, each
# with one of its sets of parameters, another one in each machine.
VM_KERNELS := bullseye bookworm trixie sid trixie/aarch64
VM_USERS := root nobody
VM_TESTS := -m "not any_kernel" --one-of-each {machine}

# For `make free-threaded`: many threads, native or Python's, use the C code at
# the same time; for `make asan`, its errors too.
# Not the soak with ASan, which keeps what was freed: it looks like a leak.
TESTS_THREADS := $(wildcard tests/test_threads.py tests/test_reaper*.py \
    tests/test_soak.py tests/test_interpreters.py)
TESTS_ASAN := $(filter-out %/test_soak.py,$(TESTS_THREADS)) tests/test_grace.py \
    tests/test_kernel_results.py tests/test_limits.py \
    tests/test_robust_locks.py tests/test_values.py tests/test_embedding.py
# Of each other C file there is a test; of these three each branch.  But not how
# few page faults there are: the counters are pages, too.
TESTS_COVERAGE := $(addprefix tests/test_,faults.py hardening.py support.py \
    attacks.py::test_a_victim_that_hangs_in_execve_does_not_hold_its_kill_up \
    reaper.py::test_escalate_on_means_the_same_to_a_reaper_and_to_kill \
    reaper_fork.py::test_a_child_with_the_pid_of_its_parent_is_known_for_a_child \
    robust_locks.py::test_a_lock_taken_in_the_grace_is_seen) \
    --deselect \
    tests/test_hardening.py::test_after_the_warm_up_a_kill_has_nearly_no_page_faults
TESTS_DEBUG := $(addprefix tests/test_,references.py values.py \
    kernel_results.py reaper.py interpreters.py embedding.py)

VENV := .venv
PY := $(VENV)/bin/python
C_FILES := $(wildcard src/*.c)
H_FILES := $(wildcard src/*.h)
TOOLS_C := $(wildcard tests/native/*.c bench/*.c)
# It needs the headers of valgrind.
TOOLS_C := $(filter-out $(if $(wildcard /usr/include/valgrind/memcheck.h),, \
    tests/native/uncaught.c),$(TOOLS_C))
ALL_C := $(C_FILES) $(H_FILES) $(TOOLS_C) \
    $(wildcard tests/native/*.h bench/*.h)
WARNINGS := -std=c11 -O2 -Wall -Wextra -Wconversion -Wshadow \
    -Wstrict-prototypes -Werror

.DEFAULT_GOAL := help
.PHONY: help demo test soak pressure lint format types analyze tidy wheels vm \
    clean native fuzz asan coverage valgrind free-threaded tsan debug interpreters \
    promises \
    figures bench-overhead bench-late bench-back bench-latency bench-many \
    bench-growth bench-peers
.DELETE_ON_ERROR:
# The Python that is run must be this tree's, whatever the shell has set.
unexport PYTHONPATH PYTHONHOME

help: ## list these targets
	@echo "make TARGET, where TARGET is one of"
	@sed -n 's/^\([a-z-]*\):.*## /  \1\t/p' Makefile | expand -t 20

demo: $(VENV)/built ## show it: two starved processes killed, one with mrelease
	@echo "== mrelease demo"
	@$(VENV)/bin/mrelease demo

test: $(VENV)/built $(VENV)/group-test ## run the tests; ARGS=... for pytest
	@echo "== pytest, in Python's development mode, warnings are errors"
	@$(PY) -X dev -m pytest -W error $(ARGS)

soak: $(VENV)/built ## kill all kinds in all ways; ARGS="--minutes 60 --seed 7"
	@$(PY) tests/soak.py $(ARGS)

pressure: $(VENV)/built ## kill when memory is nearly gone, in QEMU machines
	@$(PY) tests/pressure.py $(ARGS)

lint: $(VENV)/group-lint ## check the form of Python and C
	@echo "== ruff, clang-format"
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/clang-format --dry-run --Werror $(ALL_C)

format: $(VENV)/group-lint ## put Python and C into that form
	@$(VENV)/bin/ruff check --fix --quiet || true
	@$(VENV)/bin/ruff format
	@$(VENV)/bin/clang-format -i $(ALL_C)

types: $(VENV)/built $(VENV)/group-types ## check the types, and the stub
	@echo "== mypy --strict"
	@$(PY) -m mypy
	@echo "== stubtest: the stub against the module as built"
	@$(PY) -m mypy.stubtest --mypy-config-file pyproject.toml \
	    --allowlist .stubtest-allowlist mrelease
	@echo "== pyright: every public name has a complete type"
	@PATH="$(CURDIR)/$(VENV)/bin:$$PATH" \
	    pyright --verifytypes mrelease --ignoreexternal

analyze: ## compile with gcc, its analyser and clang; warnings are errors
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" gcc clang
	@mkdir -p build/analyze
	@include=$$($(PYTHON) -c \
	    'import sysconfig; print(sysconfig.get_path("include"))') && \
	for file in $(C_FILES) $(TOOLS_C); do \
	    case $$file in tests/*) gnu= ;; *) gnu=-D_GNU_SOURCE ;; esac; \
	    for cc in gcc "gcc -fanalyzer" clang; do \
	        echo "== $$cc: $$file"; \
	        $$cc $(WARNINGS) $$gnu -isystem "$$include" -Isrc \
	            -c "$$file" -o build/analyze/out.o || exit 1; \
	    done; \
	done

tidy: $(VENV)/group-tidy ## clang-tidy and cppcheck; each finding is an error
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" cppcheck
	@echo "== $$($(VENV)/bin/clang-tidy --version | grep -o 'LLVM version.*')"
	@include=$$($(PYTHON) -c \
	    'import sysconfig; print(sysconfig.get_path("include"))') && \
	printf '%s\n' $(C_FILES) $(TOOLS_C) | xargs -P "$$(nproc)" -I {} sh -c ' \
	    case {} in tests/*) gnu= ;; *) gnu=-D_GNU_SOURCE ;; esac; \
	    $(VENV)/bin/clang-tidy --quiet {} -- -std=c11 $$gnu \
	        -isystem '"$$include"' -Isrc 2>/dev/null'
	@echo "== $$(cppcheck --version)"
	@cppcheck --enable=warning,performance,portability,style --std=c11 \
	    --error-exitcode=1 --suppressions-list=.cppcheck --quiet \
	    --library=posix --library=gnu --library=python --platform=unix64 \
	    -D_GNU_SOURCE -D__x86_64__ -D__LP64__ -Isrc src tests/native bench
	@$(PYTHON) tests/report.py tidy findings=0 \
	    files=$(words $(C_FILES) $(TOOLS_C)) \
	    left_out="$$(grep -c '^# - ' .clang-tidy) of clang-tidy's checks, \
	$$(grep -c '^[a-zA-Z]*:' .cppcheck) findings of cppcheck" \
	    nolint=$$(grep -hE 'NOLINT(NEXTLINE|BEGIN)?[(]' $(ALL_C) | wc -l)

native: ## drive the native threads from C, with sanitizers; ARGS=--long
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" gcc
	@mkdir -p $(NATIVE)
	@gcc $(WARNINGS) -pthread tests/native/victim.c -o $(NATIVE)/victim
	@for how in $(NATIVE_HOW); do \
	    case $$how in \
	    plain) flags= ;; \
	    address) flags="$(SANITIZE)" ;; \
	    thread) flags="-g -fsanitize=thread" ;; \
	    esac; \
	    echo "== gcc $$flags"; \
	    rm -rf $(NATIVE)/$$how && mkdir $(NATIVE)/$$how || exit 1; \
	    for file in $(filter-out src/_mrelease.c,$(C_FILES)) \
	        tests/native/drive.c; do \
	        case $$file in tests/*) gnu= ;; *) gnu=-D_GNU_SOURCE ;; esac; \
	        gcc $(WARNINGS) $$gnu $$flags -pthread -Isrc -c $$file \
	            -o $(NATIVE)/$$how/$$(basename $$file .c).o || exit 1; \
	    done; \
	    gcc $$flags -pthread $(NATIVE)/$$how/*.o \
	        -o $(NATIVE)/$$how/drive || exit 1; \
	    TSAN_OPTIONS=halt_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 \
	        $(FIXED) $(NATIVE)/$$how/drive $(ARGS) $(NATIVE)/victim || \
	        failed=1; \
	done; \
	test -z "$$failed"

fuzz: ## feed the C code that reads with any input; ARGS="--seconds 600"
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" clang
	@mkdir -p $(FUZZ)
	@for file in $(FUZZ_C); do \
	    echo "== clang $(FUZZED): $$file"; \
	    clang $(WARNINGS) $(FUZZED) -pthread -Isrc "$$file" \
	        -o $(FUZZ)/$$(basename $$file .c) || exit 1; \
	done
	@$(PYTHON) tests/fuzz.py $(ARGS)

asan: build/asan/built ## run the tests of the C code with ASan and UBSan
	@echo "== pytest, with AddressSanitizer and UndefinedBehaviorSanitizer"
	@$(FIXED) env LD_PRELOAD="$$(gcc -print-file-name=libasan.so)" \
	    PYTHONMALLOC=malloc \
	    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	    UBSAN_OPTIONS=print_stacktrace=1 \
	    MRELEASE_TEST_VICTIM=$(CURDIR)/build/asan/victim \
	    build/asan/bin/python -m pytest -W error --quick \
	    $(TESTS_ASAN) $(ARGS)

coverage: build/coverage/drive ## each branch of the C core, taken or listed
	@for part in module drive; do \
	    : >$(COVERAGE)/$$part.counters && \
	    chmod 666 $(COVERAGE)/$$part.counters || exit 1; \
	done
	@echo "== The native threads, driven from C"
	@$(COVERAGE)/drive $(COVERAGE)/victim
	@echo "== pytest"
	@MRELEASE_TEST_VICTIM=$(COVERAGE)/victim \
	    $(COVERAGE)/bin/python -m pytest -W error --quick \
	    $(TESTS_COVERAGE) $(ARGS)
	@rm -rf $(COVERAGE)/found && \
	    mkdir -p $(COVERAGE)/found/module $(COVERAGE)/found/drive
	@MRELEASE_COUNTERS=$(COVERAGE)/found/module \
	    $(COVERAGE)/bin/python -c 'import mrelease._mrelease'
	@MRELEASE_COUNTERS=$(COVERAGE)/found/drive $(COVERAGE)/drive
	@echo "== What has run of src"
	@$(COVERAGE)/bin/python tests/branches.py \
	    --objects $(COVERAGE)/copy/build/temp*/src \
	    --list tests/native/unreachable.txt $(COVERAGE)/found/*

free-threaded: build/free-threaded/built ## the tests of threads without the GIL
	@echo "== The module does not ask for the GIL"
	@build/free-threaded/bin/python -W error -c \
	    'import sys, mrelease._mrelease; assert not sys._is_gil_enabled()'
	@echo "== pytest, on free-threaded Python"
	@PYTHON_GIL=0 build/free-threaded/bin/python -X dev -m pytest -W error \
	    $(ENDLESS:%=--deselect %) $(TESTS_THREADS) $(ARGS)
	@PYTHON_GIL=0 build/free-threaded/bin/python -X dev -m pytest -W error \
	    --quick $(ENDLESS) $(ARGS)

debug: build/debug/built ## on a debug build of Python, which counts references
	@echo "== pytest, on Python configured --with-pydebug"
	@build/debug/bin/python -X dev -m pytest -W error --quick \
	    $(TESTS_DEBUG) $(ARGS)

tsan: build/tsan/built ## the same with ThreadSanitizer, also in Python itself
	@home=$$($(PYTHON) tests/get_python.py 3.13t-tsan) && \
	    cp "$${home%/bin/*}/suppressions.txt" build/tsan/suppressions
	@echo "== A race is reported"
	@rm -f build/tsan/found.*
	@clang -g -fsanitize=thread -shared -fPIC tests/native/race.c \
	    -o build/tsan/race.so
	@$(TSAN) build/tsan/bin/python tests/tsan.py --race build/tsan/race.so
	@grep -h '^SUMMARY: .* in bump$$' build/tsan/found.*
	@rm -f build/tsan/found.*
	@echo "== pytest, on free-threaded Python with ThreadSanitizer"
	@$(TSAN) build/tsan/bin/python -m pytest -W error --quick $(NOT_TSAN) \
	    $(filter-out %/test_soak.py,$(TESTS_THREADS)) $(ARGS); \
	    status=$$?; \
	    $(PYTHON) tests/tsan.py build/tsan && exit $$status

valgrind: build/valgrind/drive ## memcheck: the C driver, and some tests
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" valgrind
	@rm -rf build/valgrind/found && mkdir build/valgrind/found
	@echo "== The native threads, driven from C"
	@for scenario in $(VALGRIND_SCENARIOS); do \
	    $(MEMCHECK) --xml-file=build/valgrind/found/drive.%p \
	        $$(test $$scenario != fork || echo $(NO_LEAKS)) \
	        build/valgrind/drive --scenario $$scenario \
	        build/valgrind/victim || exit 1; \
	done
	@echo "== pytest"
	@PYTHONMALLOC=malloc $(MEMCHECK) \
	    --xml-file=$(CURDIR)/build/valgrind/found/pytest.%p \
	    build/valgrind/bin/python -m pytest -W error --quick \
	    $(TESTS_VALGRIND) $(ARGS)
	@$(PYTHON) tests/valgrind.py build/valgrind/found

wheels: ## build the sdist, from it the wheels; audit and test them
wheels: $(VENV)/group-wheels $(WHEEL_ENVS)
	@rm -rf dist build/sdist
	@echo "== The sdist"
	@$(PY) -m build --sdist --outdir dist >/dev/null
	@mkdir -p build/sdist
	@tar -xzf dist/mrelease-*.tar.gz --strip-components=1 -C build/sdist
	@for v in $(wordlist 1,2,$(WHEEL_PYTHONS)); do \
	    echo "== The wheel built by Python $$v from the sdist"; \
	    build/python-$$v/bin/python -m pip wheel --quiet --no-deps \
	        --wheel-dir dist dist/mrelease-*.tar.gz || exit 1; \
	done
	@ls -l dist
	@echo "== Each small, one for 3.11, one for 3.12 and later"
	@$(PY) -c "$$WHEEL_SIZE" dist/*.whl
	@ls dist/*-cp311-cp311-linux_*.whl dist/*-cp312-abi3-linux_*.whl
	@echo "== Each with a bill of materials that the schema of CycloneDX allows"
	@$(PY) -c "$$WHEEL_BILL" dist/*.whl
	@echo "== Built again, elsewhere and otherwise: the same bytes"
	@$(PY) tests/reproducible.py $(PY) \
	    build/python-$(word 2,$(WHEEL_PYTHONS))/bin/python dist
	@$(PYTHON) tests/report.py wheels builds=2
	@echo "== twine, auditwheel, abi3audit"
	@$(VENV)/bin/twine check --strict dist/*
	@for wheel in dist/*.whl; do \
	    $(VENV)/bin/auditwheel show "$$wheel" || exit 1; \
	done
	@$(VENV)/bin/abi3audit --strict --report dist/*-abi3-*.whl
	@for v in $(WHEEL_PYTHONS); do \
	    echo "== The wheel on Python $$v: the tests of the sdist"; \
	    build/python-$$v/bin/python -m pip install --quiet --no-index \
	        --no-deps --find-links dist mrelease || exit 1; \
	    (cd build/sdist && ../python-$$v/bin/python -X dev -m pytest \
	        -W error --quick --one-of-each $$v $(WHEEL_TESTS) $(ARGS)) || \
	        exit 1; \
	done

interpreters: $(VENV)/group-wheels ## the tests on 3.11 to 3.15, t and d: a table
	@rm -rf build/interpreters/dist
	@$(PY) -m build --sdist --outdir build/interpreters/dist >/dev/null
	@$(PY) tests/interpreters.py build/interpreters $(ARGS)

bench-overhead: $(VENV)/built $(VENV)/group-bench ## what a call costs
	@$(PY) bench/overhead.py $(ARGS)

bench-late: $(VENV)/built ## how often a release comes too late (hours)
	@$(PY) bench/late.py $(ARGS)

bench-back: $(VENV)/built ## how long until the memory is back
	@$(PY) bench/back.py $(ARGS)

bench-latency: $(VENV)/built ## how soon SIGKILL leaves
	@$(PY) bench/latency.py $(ARGS)

bench-many: $(VENV)/built ## many victims at once
	@$(PY) bench/many.py $(ARGS)

bench-peers: $(VENV)/built ## beside earlyoom, nohang, pkill and ctypes
	@$(PY) bench/peers.py $(ARGS)

bench-growth: $(VENV)/built ## how the time of a kill grows with the victim
	@$(PY) bench/growth.py $(ARGS)

figures: $(VENV)/built $(VENV)/group-bench ## all figures of the docs (an hour)
	@$(PY) bench/figures.py $(ARGS)

promises: $(MADE) ## the page of what is promised; ARGS=FOLDER of new reports
	@$(PY) tests/promises.py $(ARGS)

vm: build/vm/built ## run the tests on other kernels (QEMU)
	@echo "== The installed wheel in machines of its own"
	@build/vm/bin/python tests/vm/run.py $(VM_KERNELS:%=--kernel %) \
	    $(VM_USERS:%=--user %) $(if $(MRELEASE_REPORT),--json \
	    $(MRELEASE_REPORT)/vm.json) -W error --quick --timeout 600 \
	    -o faulthandler_timeout=900 $(VM_TESTS) $(ARGS)

clean: ## remove what the targets above made
	rm -rf .venv build dist src/*.egg-info src/mrelease/*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Setting up -----------------------------------------------------------

# Runs on whatever $(PYTHON) is, so it is written for all of them.
define PREFLIGHT
import os, shutil, sys
python, tools = sys.argv[1], sys.argv[2:]
v = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 11):
    sys.exit("mrelease needs Python 3.11 or later, and " + python + " is "
             + v + ". Name another one: make PYTHON=python3.12 ...")
import importlib.util, sysconfig
missing = []
if importlib.util.find_spec("ensurepip") is None:
    missing.append(("pip for virtual environments (ensurepip)",
                    "python" + v + "-venv"))
if not os.path.exists(sysconfig.get_path("include") + "/Python.h"):
    missing.append(("the C headers (Python.h)", "python" + v + "-dev"))
for tool in tools:
    if shutil.which(tool) is None:
        missing.append((tool, "gcc" if tool == "cc" else tool))
if missing:
    sys.exit("mrelease cannot be built with " + sys.executable
             + ": missing " + ", ".join(m[0] for m in missing)
             + ".\nOn Debian or Ubuntu, this installs it: apt-get install "
             + " ".join(m[1] for m in missing))
endef
export PREFLIGHT

# A killer loads neither demo nor bench, nor the bill of materials.
define WHEEL_SIZE
import os, re, sys, zipfile
NOT_LOADED = re.compile(
    "mrelease/(bench|chart|demo|holds|meter|stage)[.]py|.*[.]cdx[.]json")
for wheel in sys.argv[1:]:
    other = sum(each.compress_size for each in zipfile.ZipFile(wheel).filelist
                if NOT_LOADED.fullmatch(each.filename))
    size = os.path.getsize(wheel)
    print(f"{wheel}: {size:,} bytes, {size - other:,} without demo, bench and bill")
    if size - other >= 100 << 10 or size >= 136 << 10:
        sys.exit("too big: at most 102,400 without those, 139,264 in all")
endef
export WHEEL_SIZE

define WHEEL_BILL
import hashlib, json, re, sys, zipfile
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
for wheel in sys.argv[1:]:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist()
                   if re.fullmatch(r"[^/]+[.]dist-info/sboms/.+", name))
        text = archive.read(name).decode()
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text):
        sys.exit(f"{wheel}: {name}: {error}")
    files = json.loads(text)["components"]
    for each in files:
        with open("build/sdist/" + each["name"], "rb") as file:
            found = hashlib.sha256(file.read()).hexdigest()
        assert each["hashes"][0]["content"] == found, each
    print(f"{wheel}: {name}, {len(files)} sources")
endef
export WHEEL_BILL

# The name of the stamp has $(PYTHON) in it: another Python, another .venv.
MADE := $(VENV)/made-with-$(subst /,_,$(PYTHON))
$(MADE):
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "mrelease needs Python 3.11 or later: there is no $(PYTHON)." \
	        "Name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" cc
	@echo "== Setting up $(VENV) with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PY) -m pip install --quiet --upgrade "pip>=25.1"
	@touch $@

# --- Sanitizers and another Python -----------------------------------------

NATIVE := build/native
NATIVE_HOW := plain address thread
SANITIZE := -g -fsanitize=address,undefined -fno-sanitize-recover=undefined \
    -fno-omit-frame-pointer
FUZZ := build/fuzz
FUZZ_C := $(wildcard tests/native/fuzz_*.c)
FUZZED := -g -fsanitize=fuzzer,address,undefined \
    -fno-sanitize-recover=undefined
# gcc 12's runtimes do not start where addresses are very random.
FIXED = $(shell setarch -R true 2>/dev/null && echo setarch -R)

# Every process counts into one file: tests/native/counters.c says how.
COVERAGE := $(CURDIR)/build/coverage
COUNT = -g -O0 --coverage -fprofile-update=atomic -fdata-sections \
    -fprofile-info-section=gcov_info \
    -Wl,-T,$(CURDIR)/tests/native/counters.ld
FLAGS_asan = $(SANITIZE)
FLAGS_coverage = $(COUNT) $(COVERAGE)/module.o

# With four threads that never wait, 500 forks take some ten minutes.
ENDLESS := \
    tests/test_threads.py::test_forks_at_any_moment_of_kills_in_other_threads

# All but stuck: see uncaught.c.  The children of fork lack the stacks of the
# other threads, and what these have allocated seems to be lost.
VALGRIND_SCENARIOS := kinds storm many late-looks moments graces closers fork \
    descriptors no-pool one-cpu numbers gone
TESTS_VALGRIND := tests/test_kernel_results.py tests/test_reaper.py \
    -k "ebadf or flags or no_fd or success_in or outlives or polled or \
    two_threads"
NO_LEAKS := --show-leak-kinds=none --errors-for-leak-kinds=none
MEMCHECK := LD_PRELOAD=$(CURDIR)/build/valgrind/uncaught.so \
    MRELEASE_TEST_VICTIM=$(CURDIR)/build/valgrind/victim \
    valgrind -q --fair-sched=try --leak-check=full \
    --show-leak-kinds=definite --errors-for-leak-kinds=definite \
    --suppressions=tests/native/valgrind.supp --xml=yes

# Each process writes what it finds into a file of its own; forked children
# make threads, too.  The suppressions are CPython's, with its reasons.
TSAN_SETTINGS := suppressions=$(CURDIR)/build/tsan/suppressions:exitcode=0
TSAN_SETTINGS := $(TSAN_SETTINGS):log_path=$(CURDIR)/build/tsan/found
TSAN = PYTHON_GIL=0 TSAN_OPTIONS="$(TSAN_SETTINGS):die_after_fork=0" $(FIXED)
# Not the soak: what ThreadSanitizer remembers of all memory looks like a leak,
# and each result is late.  And these threads are too slow to meet at all.
NOT_TSAN := --deselect \
    tests/test_threads.py::test_a_victim_is_closed_while_8_threads_use_it

# These build the package in a copy: the module of .venv lies in src, and
# setuptools would take the objects of other flags from build.
COPIED := pyproject.toml setup.py README.md LICENSE src
FLAGS_asan := $(SANITIZE)
FLAGS_valgrind := -g
build/%/built: $(MAKEFILE_LIST) setup.py pyproject.toml $(C_FILES) \
    $(H_FILES) $(wildcard src/mrelease/*.py) tests/native/victim.c
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" gcc
	@echo "== Setting up build/$*"
	@case $* in \
	free-threaded) python="$$($(PYTHON) tests/get_python.py 3.13t)" ;; \
	debug) python="$$($(PYTHON) tests/get_python.py 3.13d)" ;; \
	*) python="$(PYTHON)" ;; \
	esac && "$$python" -m venv --clear build/$*
	@build/$*/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	@build/$*/bin/python -m pip install --quiet --prefer-binary \
	    --group test-core
	@mkdir build/$*/copy && cp -r $(COPIED) build/$*/copy && \
	    rm -f build/$*/copy/src/mrelease/*.so
	@$(if $(filter coverage,$*),for part in module drive; do \
	    gcc $(WARNINGS) -fPIC -c tests/native/counters.c \
	        -DCOUNTERS="\"$(COVERAGE)/$$part.counters\"" \
	        -o build/coverage/$$part.o || exit 1; \
	done)
	@MRELEASE_CFLAGS="$(FLAGS_$*)" \
	    build/$*/bin/python -m pip install --quiet --no-deps build/$*/copy
	@# What is preloaded is not loaded into a static victim.
	@gcc -std=c11 -O2 -static -pthread tests/native/victim.c \
	    -o build/$*/victim
	@touch $@

# The objects are the module's, so that the branches are the same.
build/coverage/built: tests/native/counters.c tests/native/counters.ld
build/coverage/drive: build/coverage/built tests/native/drive.c
	@gcc $(WARNINGS) -g -pthread -Isrc -c tests/native/drive.c \
	    -o build/coverage/driver.o
	@gcc -pthread $(COUNT) build/coverage/driver.o build/coverage/drive.o \
	    $(filter-out %/_mrelease.o,$(patsubst src/%.c,$(COVERAGE)/copy/build/temp*/src/%.o,$(C_FILES))) \
	    -o $@

# The driver, and what is preloaded; beside the package.
build/valgrind/drive: $(C_FILES) $(H_FILES) tests/native/drive.c \
    tests/native/uncaught.c build/valgrind/built
	@gcc $(WARNINGS) -g -fPIC -shared tests/native/uncaught.c \
	    -o build/valgrind/uncaught.so
	@gcc $(WARNINGS) -g -pthread -Isrc \
	    tests/native/drive.c -c -o build/valgrind/drive.o
	@gcc $(WARNINGS) -g -D_GNU_SOURCE -pthread -Isrc \
	    $(filter-out src/_mrelease.c,$(C_FILES)) build/valgrind/drive.o \
	    -o $@

# pip would take minutes with ThreadSanitizer: what it has installed for the
# Python of the same kind without is copied.
build/tsan/built: build/free-threaded/built
	@$(PYTHON) -c "$$PREFLIGHT" "$(PYTHON)" clang
	@echo "== Setting up build/tsan"
	@python="$$($(PYTHON) tests/get_python.py 3.13t-tsan)" && \
	    TSAN_OPTIONS=report_bugs=0 $(FIXED) "$$python" -m venv --clear \
	        --without-pip build/tsan
	@cp -r build/free-threaded/lib/python*/site-packages \
	    build/tsan/lib/python*/
	@rm -rf build/tsan/lib/python*/site-packages/mrelease* \
	    build/free-threaded/copy/build
	@CC=clang MRELEASE_CFLAGS="-g -fsanitize=thread" \
	    build/free-threaded/bin/python -m pip install --quiet --no-deps \
	    --target build/tsan/lib/python*/site-packages \
	    build/free-threaded/copy
	@cp build/free-threaded/victim build/tsan/victim
	@touch $@

# A fresh environment of Python 3.x for `make wheels`, each time.
.PHONY: $(WHEEL_ENVS)
$(WHEEL_ENVS): build/python-%:
	@for python in "$(PYTHON$*)" python$* \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$*.*/bin/python$*; do \
	    if "$$python" -c 'import ensurepip' 2>/dev/null; then \
	        echo "== Setting up $@ with $$python"; \
	        "$$python" -m venv --clear $@ && \
	        $@/bin/python -m pip install --quiet --upgrade "pip>=25.1" && \
	        $@/bin/python -m pip install --quiet --group test; \
	        exit; \
	    fi; \
	done; \
	echo "The wheels need Python $*, with venv: install it, or name it:" \
	    "make PYTHON$*=/path/to/python$* wheels" >&2; exit 1

# One stamp a dependency group: a target installs what it needs, no more.
$(VENV)/group-%: $(MADE) pyproject.toml
	@echo "== Installing the $* tools into $(VENV)"
	@$(PY) -m pip install --quiet --group $*
	@touch $@

$(VENV)/built: $(VENV)/group-build setup.py $(C_FILES) $(H_FILES)
	@echo "== Building the extension"
	@$(PY) -m pip install --quiet --no-build-isolation --no-deps -e .
	@touch $@
