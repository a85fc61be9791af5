// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"encoding/json"

	"github.com/zipserv/zipserv/core/cuda/plan"
	"github.com/zipserv/zipserv/core/cuda/tuned"
)

// request is what Control is asked, as JSON. Problem counts for all but save, list and clear.
type request struct {
	Do string `json:"do"`
	tuned.Problem
	Split   uint64        `json:"split"`   // of candidates: the one with that many shares of K, alone
	Choice  *plan.Choice  `json:"choice"`  // of prepare and choose
	Entries []tuned.Entry `json:"entries"` // of save
}

type reply struct {
	Choices []plan.Choice `json:"choices,omitempty"`
	Current *plan.Choice  `json:"current,omitempty"`
	File    string        `json:"file,omitempty"`
	Total   int           `json:"total,omitempty"`
	Files   []tuned.File  `json:"files,omitempty"`
}

// Control is the engine's side of `zipserv tune`: one request and its reply, both JSON (docs/gpu.md). It is no part of any hot path. device
// is needed by all requests but list and clear.
func Control(ordinal int, text []byte) ([]byte, error) {
	var r request
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(&r); err != nil {
		return nil, badArgument("not a request: %v", err)
	}
	var out reply
	var err error
	switch r.Do {
	case "list":
		out.Files, err = TunedFiles()
	case "clear":
		out.Total, err = ClearTuned()
	case "candidates", "current", "prepare", "choose", "unchoose", "save":
		var e *Engine
		if e, err = Default(); err == nil {
			out, err = e.control(ordinal, &r)
		}
	default:
		return nil, badArgument("there is no request %q", r.Do)
	}
	if err != nil {
		return nil, err
	}
	return json.Marshal(out)
}

func (e *Engine) control(ordinal int, r *request) (out reply, err error) {
	d, err := e.Device(ordinal)
	if err != nil {
		return out, err
	}
	switch r.Do {
	case "candidates":
		if r.Split == 0 {
			out.Choices, err = d.Candidates(r.Problem)
			break
		}
		var c plan.Choice
		c, err = d.Split(r.Problem, r.Split)
		out.Choices = []plan.Choice{c}
	case "current":
		var c plan.Choice
		c, err = d.Current(r.Problem)
		out.Current = &c
	case "prepare":
		if r.Choice == nil {
			return out, badArgument("prepare needs a choice")
		}
		err = d.Prepare(r.Problem, *r.Choice)
	case "choose":
		err = d.Choose(r.Problem, r.Choice)
	case "unchoose":
		err = d.Unchoose(r.Problem)
	case "save":
		out.File, out.Total, err = d.SaveTuned(r.Entries)
	}
	return out, err
}
