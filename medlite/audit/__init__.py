"""Published claims beside what is measured."""
