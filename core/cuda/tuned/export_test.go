// SPDX-License-Identifier: Apache-2.0

package tuned

import "encoding/json"

// Sealed is a file with that table.
func Sealed(table []byte) []byte {
	data, err := json.Marshal(document{Checksum: checksum(table), Table: table})
	if err != nil {
		panic(err)
	}
	return data
}
