// SPDX-License-Identifier: Apache-2.0

package format

import (
	"errors"
	"fmt"
)

// ErrInvalid is what every error about the bytes of a blob is (errors.Is): damaged, truncated, or not a blob at all.
var ErrInvalid = errors.New("invalid ZipServ blob")

// ErrArgument is what every error about a caller's argument is (errors.Is).
var ErrArgument = errors.New("invalid argument")

type kindError struct {
	kind error
	msg  string
}

func (e *kindError) Unwrap() error { return e.kind }

func (e *kindError) Error() string {
	if e.kind == ErrInvalid {
		return ErrInvalid.Error() + ": " + e.msg
	}
	return e.msg
}

// Invalidf makes an error of the kind ErrInvalid.
func Invalidf(msg string, args ...any) error {
	return &kindError{ErrInvalid, fmt.Sprintf(msg, args...)}
}

// Argumentf makes an error of the kind ErrArgument.
func Argumentf(msg string, args ...any) error {
	return &kindError{ErrArgument, fmt.Sprintf(msg, args...)}
}

// InTile says in which block tile an error of these kinds was found.
func InTile(t uint64, err error) error {
	if e, ok := err.(*kindError); ok {
		return &kindError{e.kind, fmt.Sprintf("block tile %d: %s", t, e.msg)}
	}
	return err
}
