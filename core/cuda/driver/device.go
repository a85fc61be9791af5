// SPDX-License-Identifier: Apache-2.0

package driver

// #include "shim.h"
import "C"

import "fmt"

// Device holds what the launch plans need to know of a GPU.
type Device struct {
	Ordinal      int
	Name         string
	Memory       uint64 // bytes
	Major, Minor int    // compute capability
	SMs          int
	SmemBlock    int // bytes of shared memory that one block may ask for
	SmemSM       int // bytes of shared memory of one SM

	// 0 where the driver does not tell.
	L2        int // bytes
	ClockKHz  int // of the SMs
	MemoryKHz int
	BusBits   int
}

// Bandwidth is the memory's own rate in bytes/s (two transfers a clock), 0 where the driver does not tell.
func (d Device) Bandwidth() float64 { return 2 * float64(d.MemoryKHz) * 1e3 * float64(d.BusBits) / 8 }

// The driver's numbers of the attributes, in the order in which Device takes them.
var deviceAttributes = [...]C.int{75, 76, 16, 97, 81, 38, 13, 36, 37}

const neededAttributes = 5

// Device reads the properties of one device.
func (d *Driver) Device(ordinal int) (Device, error) {
	if ordinal < 0 || ordinal >= d.devices {
		return Device{}, fmt.Errorf("there is no CUDA device %d: the driver shows %d", ordinal, d.devices)
	}
	var name [128]C.char
	var memory C.size_t
	var values [len(deviceAttributes)]C.int
	attributes := deviceAttributes
	r := C.zs_device(d.cu, C.int(ordinal), &name[0], C.int(len(name)), &memory, &attributes[0], &values[0], C.int(len(values)), neededAttributes)
	if err := d.check(r); err != nil {
		return Device{}, err
	}
	return Device{
		Ordinal: ordinal, Name: C.GoString(&name[0]), Memory: uint64(memory),
		Major: int(values[0]), Minor: int(values[1]), SMs: int(values[2]),
		SmemBlock: int(values[3]), SmemSM: int(values[4]), L2: int(values[5]), ClockKHz: int(values[6]), MemoryKHz: int(values[7]), BusBits: int(values[8]),
	}, nil
}
