"""Which plugins the tests use; fixtures live beside what they make."""

pytest_plugins = ["tests.emulator"]
