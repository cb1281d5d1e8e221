"""Our ops inside other packages. Each file imports the package it is named after; nothing here is imported unasked."""
