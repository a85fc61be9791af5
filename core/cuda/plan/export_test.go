// SPDX-License-Identifier: Apache-2.0

package plan

// What the sources repeat.
const (
	RelayControl = relayControl
	MostSharers  = mostSharers
	Shorter      = shorter
	RelayWarps   = relayWarps
)
