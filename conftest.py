"""Options of the tests in `tests/` and `kernels/tests/`."""

from shares import add_options, choose

pytest_addoption, pytest_collection_modifyitems = add_options, choose
