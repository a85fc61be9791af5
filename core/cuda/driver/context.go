// SPDX-License-Identifier: Apache-2.0

package driver

// #include <stdlib.h>
// #include "shim.h"
import "C"

import (
	"runtime"
	"unsafe"
)

// Handles of the driver are kept as numbers: they are not Go memory, and torch passes them as numbers too.
type (
	// Stream is a CUstream; 0 is the legacy default stream.
	Stream uint64
	// Event is a CUevent without timing.
	Event uint64
	// Module is a loaded cubin or PTX image.
	Module uint64
	// Function is a kernel of a module.
	Function uint64
	// Pointer is an address in device memory.
	Pointer uint64
	// Graph is a graph under construction by a stream capture.
	Graph uint64
)

// Context is a device's primary context, the one that torch works in. It is retained for the life of the process.
type Context struct {
	d   *Driver
	ctx C.uint64_t
}

// PrimaryContext retains the primary context of a device.
func (d *Driver) PrimaryContext(ordinal int) (*Context, error) {
	c := &Context{d: d}
	if err := d.check(C.zs_primary(d.cu, C.int(ordinal), &c.ctx)); err != nil {
		return nil, err
	}
	return c, nil
}

// Load loads a cubin, or PTX that ends in a zero byte. It may be called while a stream is being captured.
func (c *Context) Load(image []byte) (Module, error) {
	var m C.uint64_t
	err := c.d.check(C.zs_load(c.d.cu, c.ctx, unsafe.Pointer(unsafe.SliceData(image)), &m))
	return Module(m), err
}

// Unload frees a module.
func (c *Context) Unload(m Module) error {
	return c.d.check(C.zs_unload(c.d.cu, c.ctx, C.uint64_t(m)))
}

// Function looks a kernel up and allows it the given dynamic shared memory.
func (c *Context) Function(m Module, name string, smem uint32) (Function, error) {
	cname := C.CString(name)
	defer C.free(unsafe.Pointer(cname))
	var f C.uint64_t
	err := c.d.check(C.zs_function(c.d.cu, c.ctx, C.uint64_t(m), cname, C.uint32_t(smem), &f))
	return Function(f), err
}

// Attributes of a loaded kernel, by the driver's numbers.
const (
	AttributeLocalBytes = 3
	AttributeRegisters  = 4
)

// FunctionAttribute reads one attribute of a kernel.
func (c *Context) FunctionAttribute(f Function, attribute int) (int, error) {
	var v C.int
	err := c.d.check(C.zs_function_attribute(c.d.cu, c.ctx, C.uint64_t(f), C.int(attribute), &v))
	return int(v), err
}

// Occupancy is the number of blocks of a kernel that one SM holds at a time.
func (c *Context) Occupancy(f Function, block, smem uint32) (int, error) {
	var n C.int
	err := c.d.check(C.zs_occupancy(c.d.cu, c.ctx, C.uint64_t(f), C.int(block), C.size_t(smem), &n))
	return int(n), err
}

// ClusterOccupancy is the number of clusters of so many blocks of a kernel that the whole device holds at a time. The blocks of a cluster share a GPC,
// so these may be fewer blocks than Occupancy times the SMs.
func (c *Context) ClusterOccupancy(f Function, block, smem, cluster uint32) (int, error) {
	var n C.int
	err := c.d.check(C.zs_cluster_occupancy(c.d.cu, c.ctx, C.uint64_t(f), C.uint32_t(block), C.uint32_t(smem), C.uint32_t(cluster), &n))
	return int(n), err
}

// MaxArgs is the largest number of parameters of a kernel.
const MaxArgs = C.ZS_MAX_ARGS

// Launch describes one kernel launch. Parameters of up to 8 bytes stand in one slot each, little-endian; a struct, which comes last, in all from its own on.
type Launch struct {
	Function     Function
	Stream       Stream
	Grid         [3]uint32
	Block        uint32
	Smem         uint32
	Cluster      uint32 // blocks along x that share a cluster, of which Grid[0] is a multiple; 0 or 1: none
	Programmatic bool   // programmatic dependent launch
	Args         [MaxArgs]uint64
	NumArgs      int
	Tensors      [C.ZS_MAX_TENSORS]Tensor
}

// Tensor describes a BF16 matrix that a kernel reads or writes by tensor copies of Box rows of 64 columns in the 128-byte swizzle; the maps are the kernel's last
// parameters, after Args. Data is a multiple of 16 bytes, Ld (elements from one row to the next) of 8. Box 0: none. Matrices not 0: the map has a third dimension, of so
// many matrices, one behind the other.
type Tensor struct {
	Data                         Pointer
	Ld                           uint64
	Rows, Columns, Box, Matrices uint32
}

// Launch queues a kernel. It allocates nothing.
func (c *Context) Launch(l *Launch) error {
	a := C.zs_launch_args{
		ctx: c.ctx, function: C.uint64_t(l.Function), stream: C.uint64_t(l.Stream),
		grid:  [3]C.uint32_t{C.uint32_t(l.Grid[0]), C.uint32_t(l.Grid[1]), C.uint32_t(l.Grid[2])},
		block: C.uint32_t(l.Block), smem: C.uint32_t(l.Smem), cluster: C.uint32_t(l.Cluster), nargs: C.uint32_t(l.NumArgs),
	}
	if l.Programmatic {
		a.programmatic = 1
	}
	for i := range l.Tensors {
		from, to := &l.Tensors[i], &a.tensors[i]
		to.box, to.rows, to.columns, to.matrices = C.uint32_t(from.Box), C.uint32_t(from.Rows), C.uint32_t(from.Columns), C.uint32_t(from.Matrices)
		to.data, to.ld = C.uint64_t(from.Data), C.uint64_t(from.Ld)
	}
	for i := range l.NumArgs {
		a.args[i] = C.uint64_t(l.Args[i])
	}
	r := C.zs_launch(c.d.cu, &a)
	if r.code != 0 {
		return c.d.check(r)
	}
	return nil
}

// NewStream makes a stream that does not wait for the legacy default stream.
func (c *Context) NewStream() (Stream, error) {
	var s C.uint64_t
	err := c.d.check(C.zs_stream_create(c.d.cu, c.ctx, &s))
	return Stream(s), err
}

// DestroyStream gives a stream back; work queued on it still runs.
func (c *Context) DestroyStream(s Stream) error {
	return c.d.check(C.zs_stream_destroy(c.d.cu, c.ctx, C.uint64_t(s)))
}

// Synchronize waits until all work queued on the stream is done.
func (c *Context) Synchronize(s Stream) error {
	return c.d.check(C.zs_stream_synchronize(c.d.cu, c.ctx, C.uint64_t(s)))
}

// Wait makes later work of the stream wait for the event.
func (c *Context) Wait(s Stream, e Event) error {
	return c.d.check(C.zs_stream_wait(c.d.cu, c.ctx, C.uint64_t(s), C.uint64_t(e)))
}

// Capture says whether the stream is being captured into a graph, and which capture and graph that is.
func (c *Context) Capture(s Stream) (active bool, id uint64, g Graph, err error) {
	var status C.int
	var cid, graph C.uint64_t
	r := C.zs_stream_capture(c.d.cu, c.ctx, C.uint64_t(s), &status, &cid, &graph)
	if r.code != 0 {
		return false, 0, 0, c.d.check(r)
	}
	return status == 1, uint64(cid), Graph(graph), nil
}

// NewEvent makes an event for ordering, without timing.
func (c *Context) NewEvent() (Event, error) {
	var e C.uint64_t
	err := c.d.check(C.zs_event_create(c.d.cu, c.ctx, 0, &e))
	return Event(e), err
}

// NewSleepEvent makes an event for which Await sleeps.
func (c *Context) NewSleepEvent() (Event, error) {
	var e C.uint64_t
	err := c.d.check(C.zs_event_create(c.d.cu, c.ctx, 1, &e))
	return Event(e), err
}

// Await waits on the host for what the event marks; an event that marks nothing yet is there.
func (c *Context) Await(e Event) error {
	return c.d.check(C.zs_event_await(c.d.cu, c.ctx, C.uint64_t(e)))
}

// AllocHost allocates zeroed page-locked host memory, for the life of the process.
func (c *Context) AllocHost(bytes int) ([]byte, error) {
	var p C.uint64_t
	if err := c.d.check(C.zs_alloc_host(c.d.cu, c.ctx, C.size_t(bytes), &p)); err != nil {
		return nil, err
	}
	return unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&p))), bytes), nil
}

// DestroyEvent gives an event back.
func (c *Context) DestroyEvent(e Event) error {
	return c.d.check(C.zs_event_destroy(c.d.cu, c.ctx, C.uint64_t(e)))
}

// Record marks the present end of the stream's work by the event.
func (c *Context) Record(e Event, s Stream) error {
	return c.d.check(C.zs_event_record(c.d.cu, c.ctx, C.uint64_t(e), C.uint64_t(s)))
}

// MemoryInfo is the device's free and total memory in bytes.
func (c *Context) MemoryInfo() (free, total uint64, err error) {
	var f, t C.size_t
	err = c.d.check(C.zs_memory_info(c.d.cu, c.ctx, &f, &t))
	return uint64(f), uint64(t), err
}

// AllocFilled allocates device memory and sets every byte of it, by way of a stream of the caller's own. It waits until that is done,
// and may be called while another stream is being captured.
func (c *Context) AllocFilled(s Stream, bytes uint64, value byte) (Pointer, error) {
	var p C.uint64_t
	err := c.d.check(C.zs_alloc_filled(c.d.cu, c.ctx, C.uint64_t(s), C.size_t(bytes), C.uint8_t(value), &p))
	return Pointer(p), err
}

// Free gives device memory back; it waits for the device.
func (c *Context) Free(p Pointer) error {
	return c.d.check(C.zs_free(c.d.cu, c.ctx, C.uint64_t(p)))
}

// Read copies device memory to the host in the order of the stream, and waits for it.
func (c *Context) Read(s Stream, dst []byte, src Pointer) error {
	return c.d.check(C.zs_read(c.d.cu, c.ctx, C.uint64_t(s), unsafe.Pointer(unsafe.SliceData(dst)), C.uint64_t(src), C.size_t(len(dst))))
}

// Mail is 16 bytes of host memory, at the same address on the device: a kernel leaves three words there, then sets the fourth.
type Mail uint64

// AllocMail allocates zeroed mails, which stand one behind the other. It may be called while a stream is being captured.
func (c *Context) AllocMail(count int) ([]Mail, error) {
	var p C.uint64_t
	if err := c.d.check(C.zs_alloc_host(c.d.cu, c.ctx, C.size_t(16*count), &p)); err != nil {
		return nil, err
	}
	mails := make([]Mail, count)
	for i := range mails {
		mails[i] = Mail(p) + Mail(16*i)
	}
	return mails, nil
}

// ClearMail is to be called before the launch of what writes it.
func (c *Context) ClearMail(m Mail) { C.zs_mail_clear(C.uint64_t(m)) }

// AwaitMail waits for the mail. It returns false where the work of the stream has ended without one.
func (c *Context) AwaitMail(s Stream, m Mail) (words [3]uint32, there bool, err error) {
	var out [3]C.uint32_t
	var got C.int
	err = c.d.check(C.zs_mail_wait(c.d.cu, c.ctx, C.uint64_t(s), C.uint64_t(m), &out[0], &got))
	return [3]uint32{uint32(out[0]), uint32(out[1]), uint32(out[2])}, got != 0, err
}

// Write copies host memory to the device in the order of the stream. src may be reused on return.
func (c *Context) Write(s Stream, dst Pointer, src []byte) error {
	return c.d.check(C.zs_write(c.d.cu, c.ctx, C.uint64_t(s), C.uint64_t(dst), unsafe.Pointer(unsafe.SliceData(src)), C.size_t(len(src))))
}

// Released tells whether a graph, and everything instantiated from it, is gone.
type Released struct{ flag *C.int32_t }

// OnRelease ties a flag to the life of a graph. The flag is four bytes of C memory: the driver sets it from a thread of its own, at a
// time that Go does not know.
func (c *Context) OnRelease(g Graph) (*Released, error) {
	flag := (*C.int32_t)(C.calloc(1, C.sizeof_int32_t))
	if err := c.d.check(C.zs_graph_release_flag(c.d.cu, c.ctx, C.uint64_t(g), flag)); err != nil {
		C.free(unsafe.Pointer(flag))
		return nil, err
	}
	return &Released{flag: flag}, nil
}

// Done reports whether the graph is gone, and frees the flag when it is. It must not be called again after it has returned true.
func (r *Released) Done() bool {
	if C.zs_flag_load(r.flag) == 0 {
		return false
	}
	C.free(unsafe.Pointer(r.flag))
	r.flag = nil
	runtime.KeepAlive(r)
	return true
}
