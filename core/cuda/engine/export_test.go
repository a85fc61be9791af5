// SPDX-License-Identifier: Apache-2.0

package engine

import "github.com/zipserv/zipserv/core/cuda/plan"

// LaunchPlan prepares and launches a kernel with no parameters.
func (d *Device) LaunchPlan(k plan.Kernel, early bool) error {
	l, err := d.prepare(k)
	if err != nil {
		return err
	}
	return d.launchEarly(l, 0, early, 0, 0, 0, 0)
}
